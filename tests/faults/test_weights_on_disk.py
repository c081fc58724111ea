"""Weights that are not the model's, or are another file's in the middle of a run, are refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wrapq
from tests.models import DEMO
from wrapq.errors import ModelError, PlanError
from wrapq.resolve.shards import Shards

NAME = "model.layers.1.mlp.up_proj.weight"
SETTINGS = ("evaluation.tokens=1024", "tracking=none", "runtime.load=streaming")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1].contiguous(), r"is \[\d+, \d+\], and the model's \[\d+, \d+\]"),
        (lambda w: w.t().contiguous(), r"is \[\d+, \d+\], and the model's \[\d+, \d+\]"),
        (lambda w: w[0].contiguous(), r"is \[\d+\], and the model's \[\d+, \d+\]"),
    ],
    ids=["a row less", "transposed", "a vector"],
)
def test_shapes_and_types_are_the_models(change, message: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[NAME] = change(tensors[NAME])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"weights that are not the model's: {NAME} {message}"):
        wrapq.run("w8a16", [*SETTINGS, f"model.path={model}", f"paths.outputs={tmp_path / 'out'}"])


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_weights_are_floats(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[NAME] = (tensors[NAME] * 100).to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=f"is quantized already: its weights are {name}"):
        wrapq.run("w8a16", [*SETTINGS, f"model.path={model}", f"paths.outputs={tmp_path / 'out'}"])


def test_half_precision_is_a_float_like_others(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert wrapq.run("w8a16", [*SETTINGS, f"model.path={model}", f"paths.outputs={tmp_path / 'out'}"])


def rewrite(path: Path) -> None:
    save_file({"x": torch.zeros(4), "y": torch.zeros(4)}, path)


def replace(path: Path) -> None:
    rewrite(path.with_name("other"))
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, lambda path: os.truncate(path, 60)])
def test_a_file_that_changes_while_it_is_read(change, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4), "y": torch.ones(4)}, path)
    os.utime(path, (1, 1))
    shards = Shards([path])
    assert torch.equal(shards["x"], torch.ones(4))
    change(path)
    with pytest.raises(ModelError, match=f"{path}.*(was changed while it was being read|cannot be read)"):
        shards["y"]
