"""Runs that share one store at the same time, and one whose entries are damaged meanwhile: never another result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SMALL = ("evaluation.tokens=1024", "calibration.samples=8", "calibration.batch_size=4", "tracking=none")


def start(outputs: Path, *more: str) -> subprocess.Popen[str]:
    words = ["recipe=w4a16_gptq", *SMALL, "runtime.kernels=reference", f"paths.outputs={outputs}", *more]
    return subprocess.Popen([sys.executable, "-m", "wrapq", "run", *words], stdout=subprocess.PIPE, text=True)


def digests(outputs: Path) -> dict[str, str]:
    (lock,) = outputs.glob("w4a16_gptq/*/recipe.lock.yaml")
    found = yaml.safe_load(lock.read_text())["digests"]
    return {key: found[key] for key in ("qparams", "outputs")}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_two_at_once_on_one_store_and_a_third_on_its_ruins(schedule: str, tmp_path: Path) -> None:
    how = f"calibration.schedule={schedule}"
    alone = start(tmp_path / "alone", how, "runtime.cache_gb=0")
    assert alone.wait() == 0
    expected = digests(tmp_path / "alone")
    cache = tmp_path / "cache"
    both = [start(tmp_path / name, how, f"paths.cache={cache}") for name in ("first", "second")]
    assert [process.wait() for process in both] == [0, 0]
    entries = sorted(cache.glob("*/*.safetensors"))
    assert entries and not list(cache.glob("*/tmp*"))
    for index, entry in enumerate(entries):
        data = bytearray(entry.read_bytes())
        if index % 3 == 0:
            data[-5] ^= 1
        elif index % 3 == 1:
            data = data[: len(data) // 2]
        entry.write_bytes(data)
    assert start(tmp_path / "third", how, f"paths.cache={cache}").wait() == 0
    for name in ("first", "second", "third"):
        assert digests(tmp_path / name) == expected, name
