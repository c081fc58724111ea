"""Layers that engines run as one have one NVFP4 global scale, whichever algorithm rounds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.calibration.conftest import gptq_walker
from tests.conftest import build_model
from wrapq import PTQConfig, convert, prepare
from wrapq.graph.blocks import Batch
from wrapq.runtime.module import QuantizedWeight
from wrapq.wrappers.fused_layers import siblings
from wrapq.wrappers.model import convert_model

NVFP4 = PTQConfig(weight=None, activation=None, overrides={"*_proj": {"weight": "nvfp4"}})


def global_scales(model: nn.Module) -> dict[str, float]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    return {name: float(layer.qparams("weight").global_scale) for name, layer in layers.items()}


def expected(model: nn.Module) -> dict[str, float]:
    """2688 over the largest weight of all siblings, in float32."""
    linear = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "_proj" in name}
    largest = {name: torch.stack([linear[s].abs().amax() for s in siblings(name)]).amax() for name in linear}
    return {name: float(2688 / bound) for name, bound in largest.items()}


@pytest.mark.parametrize("rounding", ["rtn", "rtn with mse", "gptq"])
def test_weights_run_as_one_share_their_global_scale(rounding: str) -> None:
    model = build_model("llama")
    scales = expected(model)
    config = NVFP4 if "mse" not in rounding else PTQConfig(None, None, {"*_proj": {"weight": "nvfp4:mse"}})
    prepared = prepare(model, config)
    if rounding == "gptq":
        ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        gptq_walker(prepared).run([Batch({"input_ids": ids, "use_cache": False})], "sequential")
        done = convert_model(prepared)
    else:
        done = convert(prepared)
    assert global_scales(done) == scales
    q, k, o = (scales[f"model.layers.0.self_attn.{part}_proj"] for part in "qko")
    assert q == k != o


def test_only_those_that_have_one_share_it() -> None:
    model = build_model("llama")
    overrides = {"*_proj": {"weight": "nvfp4"}, "*.k_proj": {"weight": "int8:channel"}, "*.v_proj": None}
    alone = model.model.layers[0].self_attn.q_proj.weight.abs().amax()
    layer = convert(prepare(model, PTQConfig(None, None, overrides))).model.layers[0].self_attn.q_proj
    assert float(layer.qparams("weight").global_scale) == float(2688 / alone)


def test_names() -> None:
    assert siblings("a.b.k_proj") == ("a.b.q_proj", "a.b.k_proj", "a.b.v_proj")
    assert siblings("up_proj") == ("gate_proj", "up_proj")
    assert siblings("a.o_proj") == ("a.o_proj",) and siblings("") == ("",)
