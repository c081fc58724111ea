"""A lowered model computes what the converted one does, and is a graph of standard operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wrapq
from wrapq import PTQConfig
from wrapq.export.lowering import Lowered, in_float32, inexpressible, lower
from wrapq.export.torch_export import Logits
from wrapq.quant.spec import QuantSpec

pytest.importorskip("torchao")

IDS = torch.arange(2 * 24).view(2, 24)
EXACT, RECIPROCAL, TIES = 0.0, 1e-3, 5e-2
"""To the bit; where the operators multiply by the reciprocal of a scale; and where that decides many ties, as those of
the ends of a dynamic range."""
CASES: dict[str, tuple[str, str | None, float]] = {
    "int8 channel, static": ("int8:channel", "int8:tensor:asym", RECIPROCAL),
    "int4 groups": ("int4:g16:sym", None, EXACT),
    "uint4 groups with zero points": ("uint4:g16:asym", None, EXACT),
    "int8 tensor, int16": ("int8:tensor", "int16:tensor:sym", RECIPROCAL),
    "int4 channel, uint8": ("int4:channel", "uint8:tensor:asym", RECIPROCAL),
    "input channels": ("int8:channel@1", None, EXACT),
    "blocks with a ragged edge": ("int8:b24x24", None, EXACT),
    "dynamic, asymmetric": ("int4:g16:sym", "int8:token:asym:dyn", TIES),
    "dynamic, symmetric": ("int8:channel", "int8:token:sym:dyn", TIES),
    "dynamic groups": ("int8:channel", "int8:g16:asym:dyn", TIES),
    "fp8 tensor, static": ("fp8_e4m3:tensor", "fp8_e4m3:tensor", EXACT),
    "fp8 tokens": ("fp8_e4m3:channel", "fp8_e4m3:token:dyn", EXACT),
    "fp8 blocks with a ragged edge, groups": ("fp8_e4m3:b24x24", "fp8_e4m3:g16:dyn", EXACT),
    "16 bits in bfloat16 scales": ("int8:channel:scale=bfloat16", "uint16:tensor:asym", RECIPROCAL),
}
FAMILIES = ("llama", "gpt2", "gemma3", "opt", "mixtral")


def converted(model: nn.Module, weight: str, activation: str | None, **overrides: object) -> nn.Module:
    prepared = wrapq.prepare(model, PTQConfig(weight=weight, activation=activation, overrides=overrides))
    wrapq.calibrate(prepared, [{"input_ids": IDS}], {"round": "rtn"})
    return wrapq.convert(prepared)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same_and_so_does_its_program(name: str, make_model: Callable[..., nn.Module]) -> None:
    weight, activation, allowed = CASES[name]
    model = converted(make_model("llama"), weight, activation)
    expected, names = logits(model), [type(module) for module in model.modules()]
    lowered = lower(model)
    assert off(logits(lowered), expected) <= allowed
    assert [type(module) for module in model.modules()] == names and torch.equal(logits(model), expected)
    assert sum(isinstance(module, Lowered) for module in lowered.modules()) == sum(
        "Quantized" in t.__name__ for t in names
    )

    given, axes = (IDS, torch.ones_like(IDS)), (torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(Logits(lowered), given, dynamic_shapes=(axes, axes))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("quantize" in target and target.startswith(("quantized_decomposed", "torchao")) for target in called)
    ids = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert torch.equal(program.module()(*given), logits(lowered))
    torch.testing.assert_close(program.module()(ids, mask)[mask.bool()], logits(lowered, ids, mask)[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, make_model: Callable[..., nn.Module]) -> None:
    model = converted(make_model(family), "int4:g16:sym", "int8:tensor:asym")
    assert off(logits(lower(model)), logits(model)) <= TIES


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dynamo_traces_it(family: str, make_model: Callable[..., nn.Module]) -> None:
    lowered = lower(converted(make_model(family), "int8:channel", "int8:tensor:asym"))
    with torch.no_grad():
        program = torch.export.export(Logits(lowered), (IDS, torch.ones_like(IDS)), strict=True)
    assert torch.equal(program.module()(IDS, torch.ones_like(IDS)), logits(lowered))


def test_a_convolution_with_the_channels_of_its_input_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten())
    images = torch.randn(4, 3, 8, 8)
    net = wrapq.prepare(net, PTQConfig(weight="int8:channel", activation="int8:channel@-3"))
    wrapq.calibrate(net, [images], {"round": "rtn"})
    model = wrapq.convert(net)
    lowered = lower(model)
    with torch.no_grad():
        assert off(lowered(images), model(images)) <= RECIPROCAL
        program = torch.export.export(lowered, (images,))
        assert torch.equal(program.module()(images), lowered(images))


def test_groups_in_an_activation_order_and_corrections(make_model: Callable[..., nn.Module]) -> None:
    prepared = wrapq.prepare(make_model("llama"), PTQConfig(weight="int4:g16:sym", activation=None))
    stack = {"round": "gptq", "repair": {"algorithm": "low_rank", "rank": 2}}
    wrapq.calibrate(prepared, [{"input_ids": IDS}], stack)
    model = wrapq.convert(prepared)
    assert torch.equal(logits(lower(model)), logits(model))


@pytest.mark.parametrize(
    ("spec", "weight", "reason"),
    [
        ("nf4:g32", True, "not for nf4"),
        ("fp4_e2m1:channel", True, "not for fp4_e2m1"),
        ("nvfp4", True, "not for fp4_e2m1"),
        ("fp8_e4m3:g32:scale=fp8_e4m3:global", True, "no second one above it"),
        ("uint4:g32:asym:zero=float", True, "zero points are integers"),
        ("int8:head", False, "by head"),
        ("int8:g32", False, "by group"),
        ("fp8_e4m3:b32x32:dyn", False, "not in whole blocks"),
        ("int8:token:dyn:scale=bfloat16", False, "are float32, not bfloat16"),
    ],
)
def test_what_it_cannot_say(spec: str, weight: bool, reason: str) -> None:
    assert reason in str(inexpressible(QuantSpec.parse(spec), weight))
    assert inexpressible(QuantSpec.parse("int4:g32:sym"), True) is None


def test_it_raises_what_it_cannot_say(make_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="weight: there are operators for integers and fp8, not for nf4"):
        lower(converted(make_model("llama"), "nf4:g16", None))


def test_in_float32_nothing_computes_in_the_dtype_of_a_model_that_is_quantized_whole() -> None:
    layers = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    prepared = wrapq.prepare(layers, PTQConfig(weight="int8:channel", activation=None))
    wrapq.calibrate(prepared, [], {"round": "rtn"})
    model = wrapq.convert(prepared)
    wide = in_float32(lower(model))
    assert wide(torch.ones(2, 8)).dtype == torch.float32
