"""Each example runs as a reader would run it, and prints what its text promises."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
EXAMPLES = sorted(p.stem for p in FOLDER.glob("*.py"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example from an empty folder and returns what it prints.

    In this process, which has imported already what takes an example most of its time; one is started by itself.
    """

    def call(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
        return capsys.readouterr().out

    return call


def start(name: str, folder: Path) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert list(folder.iterdir()) == [], "an example leaves nothing behind"
    return result.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_linear(tmp_path: Path) -> None:
    out = start("linear", tmp_path)
    (error,) = numbers(r"relative error: (\S+)", out)
    ((stored, original),) = re.findall(r"(\d+) bytes with scales and bias; float (\d+)", out)
    assert 0 < error < 0.02
    assert int(stored) < 0.27 * int(original)
    assert "QuantizedLinear(weight=int8:channel:sym, input=int8:tensor:asym)" in out


def test_llama_mlp(run: Callable[[str], str]) -> None:
    errors = numbers(r"int\d+:tensor:\w+ +(\S+)", run("llama_mlp"))
    assert len(errors) == 3
    assert errors == sorted(errors), "the fewer bits the gated product has, the larger the error"
    assert errors[0] < 0.01 < errors[1] < 0.1 < errors[2]


def test_decoder_layer(run: Callable[[str], str]) -> None:
    out = run("decoder_layer")
    wide, narrow = numbers(r"points, (\S+) dB", out)
    assert wide > 40
    assert 20 < narrow < wide
    for point in ("self_attn.probs", "self_attn.key", "mlp.mul", "attention_add", "mlp_add", "input_layernorm.weight"):
        assert point in out


def test_whole_model(run: Callable[[str], str]) -> None:
    out = run("whole_model")
    ((before, after),) = re.findall(r"float (\S+), quantized (\S+)", out)
    assert float(before) < 60, "the shipped model is a trained one"
    assert 0.9 < float(after) / float(before) < 1.05
    assert "generated: 'Return a list of" in out


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_tested_and_short(name: str) -> None:
    assert f"test_{name}" in globals()
    assert (FOLDER / f"{name}.py").read_text(encoding="utf-8").count("\n") <= 80
