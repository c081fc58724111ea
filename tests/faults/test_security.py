"""Every sentence of docs/security.md has its test; those that have no other place stand here."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save

from tests import forked
from tests.engine.record import only_run
from tests.tracking.local import client
from tests.tracking.server import free_port
from wrapq.runs.lock import environment

ROOT = Path(__file__).parents[2]
SENTENCES = [
    line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith(("- ", "* ", "1."))
]
SMALL = ["recipe=w4a16_gptq", "evaluation.tokens=1024", "calibration.samples=8"]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_sentence_names_tests_that_there_are(sentence: str) -> None:
    named = re.findall(r"`(tests/\S+)::(\w+)`", sentence)
    assert named, "no test"
    for file, test in named:
        defined = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        assert test in defined, f"{file} has no {test}"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that is tracked in a database beside it."""
    outputs = tmp_path_factory.mktemp("outputs")
    done = forked.wrapq(["run", *SMALL, f"paths.outputs={outputs}"], outputs)
    assert done.returncode == 0, done.stderr
    return only_run(outputs)


@pytest.mark.slow
def test_no_weights_are_sent_unasked(recorded: Path) -> None:
    store = client(recorded.parents[1])
    run_id = json.loads((recorded / "run.json").read_text())["run_id"]
    sent = {file.path for file in store.list_artifacts(run_id)}
    assert "recipe.yaml" in sent and "model" not in sent
    assert not [path for path in sent if path.startswith("model")]


@pytest.mark.slow
def test_a_page_loads_nothing_from_elsewhere(recorded: Path) -> None:
    page = (recorded / "report.html").read_text()
    assert "<html" in page
    assert not re.findall(r"<(?:script|img|iframe|link|object|embed)[^>]*(?:src|href|data)=(?!\"?data:)", page)
    assert not re.findall(r"@import|url\((?!\"?(?:data:|#))", page)


@pytest.mark.slow
def test_what_was_installed_is_in_the_lock(recorded: Path) -> None:
    lock = yaml.safe_load((recorded / "recipe.lock.yaml").read_text())
    assert lock["environment"] == environment()
    assert {"wrapq", "torch", "transformers"} <= set(lock["environment"])


@pytest.mark.slow
def test_a_store_can_lie_and_verify_finds_it(recorded: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = [*SMALL, "tracking=none", f"paths.cache={store}"]
    assert forked.wrapq(["run", *words, f"paths.outputs={tmp_path / 'first'}"], tmp_path).returncode == 0
    entries = list(store.rglob("*.safetensors"))
    assert entries
    for entry in entries:  # as one would write it who wants it to be believed
        data = entry.read_bytes()
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        tensors = {name: t.flip(0) if t.is_floating_point() else t for name, t in load_file(entry).items()}
        lie = save(tensors, facts)
        entry.unlink()
        key = entry.name.split(".")[0]
        entry.with_name(f"{key}.{hashlib.sha256(lie).hexdigest()}.safetensors").write_bytes(lie)
    done = forked.wrapq(["run", *words, f"paths.outputs={tmp_path / 'second'}"], tmp_path)
    if done.returncode == 0:  # else the statistics were not even possible ones
        verdict = forked.wrapq(["verify", str(only_run(tmp_path / "second"))], tmp_path)
        assert verdict.returncode == 1 and "differs, first in" in verdict.stdout, verdict.stdout + verdict.stderr
    assert forked.wrapq(["verify", str(only_run(tmp_path / "first"))], tmp_path).returncode == 0


@pytest.mark.slow
def test_a_server_says_where_files_go(tmp_path: Path) -> None:
    port, place = free_port(), tmp_path / "chosen by the server"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--default-artifact-root", place.as_uri()]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        words = [*SMALL, f"tracking.uri=http://127.0.0.1:{port}", f"paths.outputs={tmp_path / 'out'}"]
        done = forked.wrapq(["run", *words], tmp_path)
        assert done.returncode == 0, done.stderr
        run_id = json.loads((only_run(tmp_path / "out") / "run.json").read_text())["run_id"]
        root = MlflowClient(f"http://127.0.0.1:{port}").get_run(run_id).info.artifact_uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)
    assert root.startswith(place.as_uri())
    assert list(place.rglob("recipe.yaml"))
