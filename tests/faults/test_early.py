"""What can be known before the model is loaded is said then, by `plan` and `run` alike."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.engine.record import only_run

TEXT = "calibration=text evaluation=text"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("runtime.device=cuda:99", 4, "runtime.device=cuda:99: this machine has"),
        ("runtime.device=mps", 4, "runtime.device=mps: this machine has no MPS device; use cpu or auto"),
        ("runtime.kernels=fast", 2, "unknown kernel 'fast'"),
        ("paths.outputs={file}/x", 5, "{file} is a file; choose another with paths.outputs=FOLDER"),
        ("paths.outputs={disk}", 5, "the disk of {disk}/w8a8_static has "),
        ("calibration=text calibration.path={file} calibration.seq_len=64", 3, "fewer than one sample of seq_len=64"),
        ("evaluation=text evaluation.path={file} evaluation.seq_len=64", 3, "fewer than one sample of seq_len=64"),
        ("calibration=text calibration.path={file}x", 2, "{file}x' does not exist"),
    ],
    ids=[
        "a GPU too many",
        "another device",
        "kernels",
        "a file",
        "a full disk",
        "calibration",
        "evaluation",
        "no data",
    ],
)
def test_it_is_refused_before_anything_is_loaded(
    command: str, words: str, status: int, said: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    names = {"file": tmp_path / "file"}
    names["file"].write_text("a few words")
    if "{disk}" in words:
        names["disk"] = request.getfixturevalue("small_disk")
    before = sorted(tmp_path.rglob("*"))
    more = ["tracking=none"] if "paths.outputs" in words else ["tracking=none", f"paths.outputs={tmp_path / 'out'}"]
    done = forked.wrapq([command, "recipe=w8a8_static", *more, *words.format(**names).split()], tmp_path)
    assert (done.returncode, said.format(**names) in done.stderr) == (status, True), done.stderr
    assert "Loading" not in done.stdout
    if command == "plan" or status != 3:  # the record of a run is opened before its data is read, which may take long
        assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_says_what_the_data_gives(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A few words that make a sentence, and some more of them. " * 40)
    words = [
        f"{part}.{key}" for part in ("calibration", "evaluation") for key in (f"path={tmp_path}/text", "seq_len=64")
    ]
    done = forked.wrapq(["plan", "recipe=w8a8_static", *TEXT.split(), *words], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " samples " in line]
    assert [line.split(":")[0] for line in lines] == ["calibration", "note", "evaluation", "note"]
    assert "were asked for" in lines[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    outputs = tmp_path_factory.mktemp("outputs")
    words = ["recipe=w8a16", "evaluation.tokens=512", "tracking=none", f"paths.outputs={outputs}"]
    done = forked.wrapq(["run", *words], outputs)
    assert done.returncode == 0, done.stderr
    return only_run(outputs)


@pytest.mark.parametrize("place", ["full", "file", "disk"])
def test_an_export_looks_at_its_folder_first(
    place: str, finished: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    target = {"full": "full", "file": "file/x", "disk": "disk/x"}[place]
    if place == "disk":
        request.getfixturevalue("small_disk")
    (finished / "model.safetensors").rename(finished / "away")  # loading it would be another error
    os.link(finished / "away", finished / "model-00001-of-00001.safetensors")
    try:
        words = ["export", str(finished), "export=compressed_tensors", "--to", str(tmp_path / target)]
        done = forked.wrapq(words, tmp_path)
    finally:
        (finished / "model-00001-of-00001.safetensors").unlink()
        (finished / "away").rename(finished / "model.safetensors")
    assert done.returncode == 5, done.stderr
    assert "Loading" not in done.stdout and str(tmp_path / target.split("/")[0]) in done.stderr
