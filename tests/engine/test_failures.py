"""Runs that fail: one message, a folder and a record that say FAILED and why, nothing half written."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wrapq
from tests.engine.record import SMALL, only_run, partial_files, recorded, status
from tests.models import DEMO, damaged, model_with_unused_modules, without_weights
from wrapq.errors import CalibrationError, ModelError, OutputError, PlanError, WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve
from wrapq.tracking.base import TrackingError

LONG = ("evaluation.tokens=65536", "calibration.samples=128")
"""A run long enough to be stopped in the middle."""


@pytest.fixture
def failing(tmp_path: Path, new_store: Callable[[Path], None]) -> Callable[..., WrapqError]:
    """Runs a recipe that fails, and checks what every failed run leaves; returns the error."""

    def run(*overrides: str, recipe: str = "demo", small: Sequence[str] = SMALL, tracking: str = "none") -> WrapqError:
        if tracking == "mlflow":
            new_store(tmp_path / "out" / "mlflow.db")
        with pytest.raises(WrapqError) as caught:
            wrapq.run(recipe, [*small, f"tracking={tracking}", f"paths.outputs={tmp_path / 'out'}", *overrides])
        check_failed(tmp_path / "out", f"{type(caught.value).__name__}: {caught.value}")
        return caught.value

    return run


def check_failed(outputs: Path, reason: str) -> None:
    """The folder, and the record where there is one, say FAILED for `reason`; no file of a result is there."""
    folder = only_run(outputs)
    assert status(folder) == {"status": "FAILED", "reason": reason}
    assert f"failed: {reason}" in (folder / "log.txt").read_text()
    assert not partial_files(outputs)
    assert not list(outputs.rglob("model.safetensors"))
    if (outputs / "mlflow.db").exists():
        run = recorded(outputs / "mlflow.db")
        assert (run.info.status, run.data.tags["failure"]) == ("FAILED", reason)
    with pytest.raises(ModelError, match="holds no quantized model: the run is FAILED: "):
        wrapq.load(folder)


# --- data and model


def test_nan_in_a_weight_names_the_weight(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    model = damaged(tmp_path / "model", "model.layers.1.mlp.down_proj.weight")
    error = failing(f"model.path={model}", recipe="w8a8_static", tracking="mlflow")
    assert (tmp_path / "out" / "mlflow.db").exists()
    assert isinstance(error, CalibrationError)
    assert str(error) == (
        "model.layers.1.mlp.down_proj.weight: the data holds NaN (1 of 256 int8:channel:sym ranges are not finite)"
    )


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "inf")])
def test_nan_in_the_data_names_the_first_point_it_reaches(
    value: float, word: str, tmp_path: Path, failing: Callable[..., WrapqError]
) -> None:
    """Token 7 has a damaged embedding, and only the calibration data holds token 7."""
    model = damaged(tmp_path / "model", "model.embed_tokens.weight", value)
    rows = numpy.full((8, 256), 300)
    rows[5, 3] = 7
    numpy.save(tmp_path / "rows.npy", rows)
    data = ("calibration=tokens", f"calibration.path={tmp_path / 'rows.npy'}", "calibration.samples=8")
    error = failing(f"model.path={model}", *data, recipe="w8a8_static")
    assert isinstance(error, CalibrationError)
    assert re.match(r"model\.layers\.0\.self_attn\.q_proj\.input: the data holds (NaN|inf)", str(error))


def test_nan_in_what_stays_float_is_not_measured_as_if_it_were_a_result(
    tmp_path: Path, failing: Callable[..., WrapqError]
) -> None:
    model = damaged(tmp_path / "model", "model.embed_tokens.weight")
    error = failing(f"model.path={model}", recipe="w8a16", small=["evaluation.tokens=2048"])
    assert isinstance(error, ModelError)
    assert str(error).startswith("the model gives NaN or infinite logits on the evaluation data: ")


def test_points_that_no_forward_reaches_are_left_float_and_named(tmp_path: Path) -> None:
    model = model_with_unused_modules(tmp_path / "bart")
    overrides = [*SMALL, "model=hf", f"model.path={model}", "tracking=none", f"paths.outputs={tmp_path / 'out'}"]
    composed = compose(["recipe=w8a8_static", *overrides])
    notes = resolve(composed.recipe, composed.sources).notes
    first = "model.decoder.layers.0.encoder_attn.k_proj and 7 more"
    assert f"{first}: no forward of tokens comes there, so that activations stay float" in notes
    assert wrapq.run("w8a8_static", overrides).sizes["quantized"] > 0


def test_weights_that_are_missing(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    model = without_weights(tmp_path / "model")
    error = failing(f"model.path={model}")
    assert isinstance(error, ModelError)
    assert str(error).startswith(f"model.path {model}: cannot read the weights: ")


def test_weights_that_are_damaged(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    model = without_weights(tmp_path / "model")
    (model / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes()[:100_000])
    error = failing(f"model.path={model}")
    assert isinstance(error, ModelError)
    assert str(error).startswith(f"model.path {model}: cannot read the weights: ")


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(
    tmp_path: Path, failing: Callable[..., WrapqError]
) -> None:
    model = without_weights(tmp_path / "model")
    tensors = load_file(DEMO / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    error = failing(f"model.path={model}")
    assert isinstance(error, ModelError)
    said = f"model.path {model}: 1 tensors are not in the weights: model.layers.2.mlp.up_proj.weight"
    assert str(error) == said


def test_too_little_text_for_one_sample(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    error = failing("calibration=text", f"calibration.path={tmp_path / 'short.txt'}")
    assert isinstance(error, CalibrationError)
    assert re.search(r"short\.txt: \d tokens, fewer than one sample of seq_len=256", str(error))


def test_tokens_of_another_vocabulary(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    numpy.save(tmp_path / "rows.npy", numpy.full((8, 256), 30_000))
    error = failing("calibration=tokens", f"calibration.path={tmp_path / 'rows.npy'}")
    assert "token id 30000 is outside the vocabulary (0 to 2047): the data was tokenized for another model" in str(
        error
    )


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ModelError, match="this machine has no CUDA device; use cpu or auto"):
        wrapq.run("demo", [*SMALL, "runtime.device=cuda", f"paths.outputs={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_cannot_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        wrapq.run("demo", ["+rules.x={match: {layers: 77}, weight: int8:channel}", f"paths.outputs={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_store_that_cannot_be_opened_fails_before_the_model_loads(tmp_path: Path) -> None:
    """The model has no weights: had it been loaded first, that would be the error."""
    (tmp_path / "file").touch()
    model = without_weights(tmp_path / "model")
    place = (f"tracking.uri=sqlite:///{tmp_path / 'file' / 'runs.db'}", f"paths.outputs={tmp_path / 'out'}")
    with pytest.raises(TrackingError, match="cannot open the tracking store"):
        wrapq.run("demo", [*SMALL, *place, f"model.path={model}"])
    assert status(only_run(tmp_path / "out"))["status"] == "FAILED"


# --- the disk


def test_an_outputs_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError) as caught:
        wrapq.run("demo", [*SMALL, f"paths.outputs={tmp_path / 'out'}"])
    place = tmp_path / "out"
    assert str(caught.value) == (
        f"cannot write {place / 'demo'}: {place} is a file; choose another with paths.outputs=FOLDER"
    )


def test_an_outputs_folder_without_permission(tmp_path: Path) -> None:
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"  # root may write everywhere but there
    if folder != Path("/proc"):
        folder.mkdir(mode=0o500)
    elif not folder.is_dir():
        pytest.skip("no folder that root cannot write to")
    with pytest.raises(OutputError, match=rf"^cannot write runs to {folder}/demo: .*; choose another with paths\."):
        wrapq.run("demo", [*SMALL, f"paths.outputs={folder}"])


def test_a_disk_that_is_too_small_from_the_start(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8)
    with pytest.raises(OutputError) as caught:
        wrapq.run("demo", [*SMALL, f"paths.outputs={disk}"])
    assert re.fullmatch(
        rf"the disk of {disk}/demo has 8 MiB free, and the quantized model needs about 6 MiB; free some, or choose "
        r"another with paths\.outputs=FOLDER",
        str(caught.value),
    )
    assert list(disk.rglob("*")) == []


@pytest.mark.parametrize("moment", [pytest.param("Calibrating", marks=pytest.mark.slow), "Saving"])
def test_a_disk_that_fills_up_during_the_run(
    moment: str, small_disk: Callable[[int], Path], new_store: Callable[[Path], None], tmp_path: Path
) -> None:
    """Another takes what is left of the disk as a step begins; the record is elsewhere."""
    disk = small_disk(40)
    new_store(tmp_path / "runs.db")
    hog, log = Hog(disk, moment), logging.getLogger("wrapq.engine.context")
    log.addHandler(hog)
    try:
        with pytest.raises(OutputError) as caught:
            overrides = [*SMALL, f"paths.outputs={disk}", f"tracking.uri=sqlite:///{tmp_path / 'runs.db'}"]
            wrapq.run("demo", overrides)
    finally:
        log.removeHandler(hog)
    assert hog.filled
    assert re.fullmatch(r"cannot write \S+: the disk is full", str(caught.value))
    assert not partial_files(disk)
    assert not list(disk.rglob("model.safetensors"))
    run = recorded(tmp_path / "runs.db")
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", f"OutputError: {caught.value}")
    assert status(only_run(disk))["status"] in ("FAILED", "RUNNING")  # the last if there was no room to say so


class Hog(logging.Handler):
    """Takes all that is free of a disk once the run's log names a moment."""

    def __init__(self, disk: Path, moment: str) -> None:
        super().__init__()
        self.disk, self.moment, self.filled = disk, moment, False

    def emit(self, record: logging.LogRecord) -> None:
        if self.filled or self.moment not in record.getMessage():
            return
        with (self.disk / "hog").open("wb", buffering=0) as hog:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        hog.write(bytes(size))
        self.filled = True


# --- interruption


def start(outputs: Path, *, ignore_interrupts: bool = False) -> subprocess.Popen[str]:
    """A long run in a process of its own."""
    shell = "trap '' INT; exec " if ignore_interrupts else "exec "
    words = [sys.executable, "-m", "wrapq", "run", *LONG, f"paths.outputs={outputs}"]
    line = shell + " ".join(f"'{word}'" for word in words)
    # tests that a shell put in the background ignore Ctrl-C, and what they start would inherit that
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        ["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    )


def wait_for(moment: str, outputs: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(moment in log.read_text() for log in outputs.glob("*/*/log.txt")):
            time.sleep(0.2)
            return
        time.sleep(0.01)
    pytest.fail(f"the run never got to {moment!r}: {process.communicate()}")


@pytest.mark.parametrize(
    ("number", "moment", "ignore_interrupts"),
    [
        (signal.SIGINT, "Calibrating", False),
        pytest.param(signal.SIGINT, "Measuring quality", False, marks=pytest.mark.slow),
        # as a shell starts what it puts in the background
        pytest.param(signal.SIGTERM, "Calibrating", True, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "Calibrating", True, marks=pytest.mark.slow),  # its terminal is gone
    ],
    ids=["ctrl-c-calibrating", "ctrl-c-measuring", "terminated-in-background", "hung-up"],
)
def test_interrupted(
    number: signal.Signals, moment: str, ignore_interrupts: bool, new_store: Callable[[Path], None], tmp_path: Path
) -> None:
    new_store(tmp_path / "out" / "mlflow.db")
    process = start(tmp_path / "out", ignore_interrupts=ignore_interrupts)
    wait_for(moment, tmp_path / "out", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert said == "error: interrupted; what was finished is kept, nothing is half written\n"
    assert process.returncode == 130
    assert (tmp_path / "out" / "mlflow.db").exists()
    check_failed(tmp_path / "out", "interrupted")


# --- the Python API is not left half done either


def test_a_failed_run_leaves_this_process_fit_for_the_next(tmp_path: Path, failing: Callable[..., WrapqError]) -> None:
    failing(f"model.path={without_weights(tmp_path / 'model')}")
    result = wrapq.run("demo", [*SMALL, "tracking=none", f"paths.outputs={tmp_path / 'second'}"])
    assert isinstance(wrapq.load(result.folder), nn.Module)
