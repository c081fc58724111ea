"""The leaves, each against the contract of all wrappers."""

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D as HFConv1D

from tests.contracts.wrapper import WrapperContract
from wrapq import PTQConfig, convert, prepare
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker
from wrapq.errors import PlanError
from wrapq.quant.qparams import QParams
from wrapq.wrappers import leaf
from wrapq.wrappers.model import convert_model

LEAF = ("weight", "input", "output")


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


class TestLinear(WrapperContract):
    wrapper, points = leaf.Linear, LEAF

    def module(self) -> nn.Module:
        return filled(nn.Linear(16, 12))


class TestLinearWithoutBias(TestLinear):
    def module(self) -> nn.Module:
        return filled(nn.Linear(16, 12, bias=False))


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own, which takes more than a tensor."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return super().forward(x) * factor + 1


class TestSubclassOfLinear(TestLinear):
    def module(self) -> nn.Module:
        return filled(ScaledLinear(16, 12))

    def test_further_arguments_reach_the_own_forward(self):
        module, (x,) = self.module(), self.inputs()
        expected = module(x, factor=3.0)
        prepared = prepare(module, PTQConfig(weight="int16:channel:sym", activations="int16:tensor:asym"))
        assert torch.equal(prepared(x, factor=3.0), expected)
        torch.testing.assert_close(convert(prepared)(x, 3.0), expected, rtol=1e-2, atol=1e-2)


class TestConv1D(WrapperContract):
    wrapper, points = leaf.Conv1D, LEAF

    def module(self) -> nn.Module:
        return filled(HFConv1D(12, 16))

    def test_channels_are_outputs_although_the_weight_is_stored_turned(self):
        prepared = prepare(self.module(), PTQConfig(weight="int8:channel:sym", activation=None))
        converted = convert(prepared)
        assert tuple(converted.weight_scale.shape) == (12, 1)
        assert converted.weight.shape == (16, 12)


class TestConv2d(WrapperContract):
    wrapper, points = leaf.Conv, LEAF

    def module(self) -> nn.Module:
        return filled(nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1))

    def inputs(self, tokens: int = 7, batch: int = 2) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 8 + tokens, 8, generator=torch.Generator().manual_seed(tokens)),)


class TestConv1d(TestConv2d):
    def module(self) -> nn.Module:
        return filled(nn.Conv1d(6, 4, 3, groups=2, padding_mode="circular", padding=1))

    def inputs(self, tokens: int = 7, batch: int = 2) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 6, 4 + tokens, generator=torch.Generator().manual_seed(tokens)),)


class TestEmbedding(WrapperContract):
    wrapper, points = leaf.Embedding, ("weight", "output")

    def module(self) -> nn.Module:
        return filled(nn.Embedding(20, 16, padding_idx=0))

    def inputs(self, tokens: int = 7, batch: int = 2) -> tuple[Tensor, ...]:
        return (torch.randint(0, 20, (batch, tokens), generator=torch.Generator().manual_seed(tokens)),)


class Scaled(nn.Embedding):
    """As Gemma's, which asks its weight for the dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(4.0).to(self.weight.dtype)


class Centered(nn.Embedding):
    """Computes with its whole table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) - self.weight.mean(0)


class Direct(nn.Embedding):
    """Does not call the forward of torch's class."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight) + 1


@pytest.mark.parametrize("spec", ["int8:channel", "int8:tensor", "uint4:g8:asym", "int8:b4x8"])
@pytest.mark.parametrize(
    ("kind", "options", "whole"),
    [
        (nn.Embedding, {"max_norm": 100.0}, True),
        (nn.Embedding, {}, False),
        (nn.Embedding, {"padding_idx": 3}, False),
        (Scaled, {}, False),
        (Centered, {}, True),
        (Direct, {}, True),
    ],
)
def test_only_the_rows_that_are_looked_up_are_dequantized(
    kind: type[nn.Embedding], options: dict, whole: bool, spec: str, monkeypatch: pytest.MonkeyPatch
):
    module = filled(kind(50, 16, **options)).to(torch.bfloat16)
    prepared = prepare(nn.Sequential(module), PTQConfig(spec, None))
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    Walker(prepared, Assignments({"0.weight": RTN()})).run([], "parallel")
    point = prepared[0].weight_quantizer
    module.weight.data, kept = point.matrix(torch.bfloat16), module.weight.data
    expected = module(ids)
    module.weight.data = kept
    sizes: list[int] = []
    dequantize = QParams.dequantize
    monkeypatch.setattr(QParams, "dequantize", lambda *args: sizes.append(len(args[1])) or dequantize(*args))
    for model in (prepared, convert_model(prepared)):
        point.release()
        for _ in range(2):
            sizes.clear()
            assert torch.equal(model(ids), expected)
        assert max(sizes) == (50 if whole else 6)
        assert model(ids[:0]).shape == (0, 3, 16)
        with pytest.raises(IndexError):
            model(torch.tensor([[50]]))


class TestEmbeddingThatMakesItsOwnIds(TestEmbedding):
    """OPT's positions take an attention mask, and two more arguments."""

    def module(self) -> nn.Module:
        return filled(OPTLearnedPositionalEmbedding(20, 16))

    def inputs(self, tokens: int = 7, batch: int = 2) -> tuple[Tensor, ...]:
        return (torch.ones(batch, tokens, dtype=torch.long), 0)

    @staticmethod
    def cast(inputs: tuple, dtype: torch.dtype) -> tuple:
        return inputs


class TestLayerNorm(WrapperContract):
    wrapper, points = leaf.LayerNorm, LEAF

    def module(self) -> nn.Module:
        return filled(nn.LayerNorm(16))


class TestRMSNorm(WrapperContract):
    wrapper, points = leaf.RMSNorm, LEAF

    def module(self) -> nn.Module:
        return filled(nn.RMSNorm(16))


class TestLlamaRMSNorm(TestRMSNorm):
    def module(self) -> nn.Module:
        return filled(LlamaRMSNorm(16))


class TestGemmaRMSNorm(TestRMSNorm):
    """It multiplies with 1 + w: the quantized weight goes through the family's own forward."""

    def module(self) -> nn.Module:
        return filled(Gemma2RMSNorm(16))


@pytest.mark.parametrize("kind", [nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh, NewGELUActivation])
def test_activations_are_found(kind: type[nn.Module]):
    assert leaf.Activation is prepare(kind(), PTQConfig(weight=None, activations="int8:tensor:asym")).wrapper


class TestSiLU(WrapperContract):
    wrapper, points = leaf.Activation, ("input", "output")

    def module(self) -> nn.Module:
        return nn.SiLU()


class TestSoftmax(TestSiLU):
    def module(self) -> nn.Module:
        return nn.Softmax(dim=-1)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(16, elementwise_affine=False), lambda: nn.RMSNorm(16, elementwise_affine=False)],
    ids=["LayerNorm", "RMSNorm"],
)
def test_a_norm_without_weight_keeps_its_other_points(make):
    model = nn.Sequential(filled(nn.Linear(16, 16)), make())
    prepared = prepare(model, PTQConfig(activations="int8:tensor:asym"))
    assert tuple(prepared[1].quantizers) == ("input", "output")
    prepared(torch.randn(2, 3, 16))
    convert(prepared)


def test_a_weight_named_for_modules_without_one_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False))
    with pytest.raises(PlanError, match="'weight'"):
        prepare(model, PTQConfig(overrides={"1": {"weight": "int8:channel"}}))
