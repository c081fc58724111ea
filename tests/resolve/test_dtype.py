"""In which type a model computes and is saved: the checkpoint's own, wherever it says so, or the recipe's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import wrapq
from tests.models import random_model
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve

GROUPS = "rules.linear.weight.group_size=32"
SMALL = (GROUPS, "evaluation.tokens=512", "tracking=none", "runtime.kernels=reference")


def plan_of(folder: Path, *overrides: str) -> Plan:
    return resolve(compose(["recipe=w8a16", GROUPS, "model=hf", f"model.path={folder}", *overrides]).recipe)


def of_type(folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint whose weights are of `dtype`, for the shipped tokenizer."""
    random_model("llama", folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def say(config: Path, change: Callable[[dict[str, object]], None]) -> None:
    said = json.loads(config.read_text())
    change(said)
    config.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("stored", "found"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float64, "float32")],
)
def test_the_checkpoint_says_it(stored: torch.dtype, found: str, tmp_path: Path) -> None:
    model = of_type(tmp_path, stored)
    assert plan_of(model).model.dtype == found
    say(model / "config.json", lambda config: config.pop("dtype"))
    assert plan_of(model).model.dtype == found, "its weights do"
    say(model / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    assert plan_of(model).model.dtype == "bfloat16", "as configurations of before say it"
    assert plan_of(model, "model.dtype=float16").model.dtype == "float16"


def test_what_stays_float_is_saved_in_it(tmp_path: Path) -> None:
    model = of_type(tmp_path / "model", torch.bfloat16)
    plan = plan_of(model)
    result = wrapq.run("w8a16", ["model=hf", f"model.path={model}", f"paths.outputs={tmp_path / 'out'}", *SMALL])
    with safe_open(result.folder / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    floats = {name for name in kinds if name.endswith(".weight")}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= floats
    assert {kinds[name] for name in floats} == {"BF16"}
    buffers = sum(b.nbytes for b in wrapq.load(result.folder).model.rotary_emb.buffers())
    assert plan.estimate.float_bytes == 2 * plan.model.parameters + buffers
    assert wrapq.load(result.folder).dtype == torch.bfloat16
