"""A library leaves its host alone: what the process is like after a call it was like before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("evaluation.tokens=128", "evaluation.seq_len=64", "calibration.samples=2", "calibration.seq_len=64")
_SCRIPT = """
import json, os, random, sys
import numpy, torch, transformers
import torch.nn as nn

def state():
    return {
        # torch names the folder of its compiler when that is imported
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR_")},
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(numpy.random.get_state()),
        "python": repr(random.getstate()),
        "engine": torch.backends.quantized.engine,
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
    }

def leaves_alone(name, call):
    torch.manual_seed(5), numpy.random.seed(6), random.seed(7), torch.set_num_threads(2)
    before = state()
    try:
        call()
        ended = "returned"
    except Exception as error:
        ended = type(error).__name__
    after = state()
    found[name] = [ended, [key for key in before if before[key] != after[key]]]

found, run = {}, sys.argv[2:]
leaves_alone("import", lambda: __import__("wrapq"))
import wrapq
from wrapq.sweep.driver import sweep

def prepare_calibrate_convert():
    model = wrapq.prepare(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), wrapq.PTQConfig())
    wrapq.calibrate(model, [torch.ones(4, 16)], {"round": "gptq"})
    wrapq.convert(model)

def api():  # making a layer takes random numbers, which is the caller's doing
    with torch.random.fork_rng():
        prepare_calibrate_convert()

leaves_alone("api", api)
leaves_alone("run", lambda: wrapq.run("w8a8_static", [*run, f"paths.outputs={sys.argv[1]}/out"]))
leaves_alone("failure", lambda: wrapq.run("w8a8_static", [*run, "paths.outputs=/proc/none"]))
jobs = ["recipe=w8a8_static", "seed=1,2", *run, "tracking=none", f"paths.outputs={sys.argv[1]}/out"]
leaves_alone("sweep", lambda: sweep(jobs))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]
) -> dict[str, tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("host")
    new_store(folder / "out" / "mlflow.db")
    command = [sys.executable, "-c", _SCRIPT, str(folder), *SMALL, "runtime.threads=1", "runtime.kernels=reference"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("call", "ended"),
    [
        ("import", "returned"),
        ("api", "returned"),
        ("run", "returned"),
        ("failure", "OutputError"),
        ("sweep", "returned"),
    ],
)
def test_nothing_is_changed(found: dict[str, tuple[str, list[str]]], call: str, ended: str) -> None:
    assert found[call] == [ended, []]
