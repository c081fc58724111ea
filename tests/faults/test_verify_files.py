"""What was changed in a run's folder since it was written is found before anything is replayed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import forked
from tests.engine.record import SMALL, only_run
from wrapq.engine.progress import Progress
from wrapq.engine.replay import verify
from wrapq.errors import ModelError
from wrapq.runs.checkpoint import read_manifest, tensors_digest
from wrapq.runs.folder import LOCK, MANIFEST, WEIGHTS
from wrapq.runs.lock import read_lock


@pytest.fixture(scope="module", params=["whole", "streaming"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    outputs = tmp_path_factory.mktemp("outputs")
    words = ["run", "recipe=w8a8_static", "~stack.smooth", *SMALL, "tracking=none", f"runtime.load={request.param}"]
    done = forked.wrapq([*words, f"paths.outputs={outputs}"], outputs)
    assert done.returncode == 0, done.stderr
    return only_run(outputs)


def replayed(folder: Path) -> list[str]:
    """The files that differ, found before anything ran."""
    verdict = verify(str(folder), [], (), Progress())
    assert not verdict.same and verdict.checked == "the files of the run itself; nothing was run"
    return [difference.what for difference in verdict.failures]


def test_every_file_of_the_result_is_named(finished: Path) -> None:
    later = {"run.json", "log.txt", "report.html", "kernels.txt", MANIFEST, LOCK}
    files = {path.name for path in finished.iterdir() if path.is_file() and not path.name.startswith(("model-", "."))}
    assert set(read_manifest(finished)["files"]) == files - later - {WEIGHTS}
    assert {"config.json", "tokenizer.json", "plan.json", "qparams.safetensors"} <= files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_each_of_them_is_compared(damage: Callable[[Path], object], finished: Path, tmp_path: Path) -> None:
    names = read_manifest(finished)["files"]
    for name in names:
        folder = Path(shutil.copytree(finished, tmp_path / name / "run"))
        damage(folder / name)
        assert replayed(folder) == [name]


def test_the_models_own_weights_are_compared(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    file = sorted(folder.glob("model*.safetensors"))[0]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][3] *= 1.5
    save_file(tensors, file)
    assert replayed(folder) == [WEIGHTS]
    file.write_bytes(file.read_bytes()[:100])
    assert replayed(folder) == [WEIGHTS]
    file.unlink()
    assert replayed(folder) == [WEIGHTS]


def test_a_model_that_is_not_the_locks(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = read_manifest(folder)
    files = sorted(folder.glob("model*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"] += 1
    for file in files:
        file.unlink()
    save_file(tensors, folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"tensors": tensors_digest(tensors)}))
    assert replayed(folder) == ["tensors", "manifest"]


def other_config(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    manifest["files"]["config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()


def unnamed(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text("{}")
    del manifest["files"]["tokenizer.json"]


def other_points(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["modules"] = {name: {"weight": points["weight"]} for name, points in manifest["modules"].items()}


def rotated(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["rotated"] = ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("rewrite", [other_config, unnamed, other_points, rotated])
def test_a_manifest_that_is_not_the_locks(rewrite: Callable[..., None], finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = read_manifest(folder)
    rewrite(folder, manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert replayed(folder) == ["manifest"]


@pytest.mark.parametrize("name", ["/dev/zero", "a\0b", "\ud800", "a" * 5000, "."])
def test_a_name_that_is_no_file(name: str, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": {name: "0"}}))
    assert replayed(folder) == [name, "manifest"]
    for files in ([name], None):
        (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(ModelError, match="files that are no digests by name"):
            replayed(folder)


@pytest.mark.parametrize("lost", ["metrics", "qparams", "tensors", "outputs"])
def test_a_lock_without_results_is_refused(lost: str, finished: Path, tmp_path: Path) -> None:
    lock = read_lock(finished / LOCK)
    digests = {name: digest for name, digest in lock.digests.items() if name != lost}
    changes = {"metrics": {}} if lost == "metrics" else {"digests": digests}
    (tmp_path / LOCK).write_text(lock.model_copy(update=changes).to_yaml())
    with pytest.raises(ModelError, match=f"lacks {lost}: it is not the lock of a finished run"):
        verify(str(tmp_path / LOCK), [], (), Progress())
