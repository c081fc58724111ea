"""A whole quantized model is saved by `torch.save` and loaded in another process, as any module is."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wrapq
from wrapq import PTQConfig
from wrapq.runtime.module import QuantizedModule

IDS = torch.arange(2 * 20).view(2, 20)
LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(input_ids=ids, use_cache=False).logits, sys.argv[3])
"""
CACHE = {"*self_attn": {"key": "int8:tensor:asym", "value": "int8:tensor:asym"}}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def prepared(model: nn.Module, **more: object) -> nn.Module:
    return wrapq.prepare(model, PTQConfig(weight="int4:g16:sym", activation="int8:tensor:asym", overrides=more))


@pytest.mark.parametrize(("family", "more"), [("llama", CACHE), ("gpt2", {}), ("gemma3", {}), ("mixtral", {})])
def test_another_process_computes_the_same(
    family: str, more: dict[str, object], make_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = prepared(make_model(family), **more)
    wrapq.calibrate(model, [{"input_ids": IDS}], {"round": "rtn"})
    model = wrapq.convert(model)
    files = [tmp_path / name for name in ("model.pt", "ids.pt", "logits.pt")]
    torch.save(model, files[0])
    torch.save(IDS, files[1])
    subprocess.run([sys.executable, "-c", LOAD, *map(str, files)], check=True)
    assert torch.equal(torch.load(files[2]), logits(model))


def test_a_copy_has_the_same_classes_and_tensors_of_its_own(make_model: Callable[..., nn.Module]) -> None:
    model = prepared(make_model("llama"), **CACHE)
    wrapq.calibrate(model, [{"input_ids": IDS}], {"round": "rtn"})
    for each in (model, wrapq.convert(copy.deepcopy(model))):  # the one that is calibrated, too
        twice = copy.deepcopy(each)
        assert [type(m) for m in twice.modules()] == [type(m) for m in each.modules()]
        assert not {p.data_ptr() for p in twice.parameters()} & {p.data_ptr() for p in each.parameters()}
        assert torch.equal(logits(twice), logits(each))
    assert any(isinstance(module, QuantizedModule) for module in twice.modules())
