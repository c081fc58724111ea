"""Which wrapper is found for which module: by base, by the text of its forward, by its look."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from wrapq import prepare
from wrapq.wrappers.attention import Attention
from wrapq.wrappers.base import Wrapper
from wrapq.wrappers.decoder import DecoderLayer, GatedMLP
from wrapq.wrappers.leaf import Linear, RMSNorm
from wrapq.wrappers.wrapper_registry import WRAPPERS, WrapperRegistry

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
LAYERS = [LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer]


def found(cls: type[nn.Module]) -> type[Wrapper] | None:
    """What is found for a module of the class, whose children and parameters do not matter here."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return WRAPPERS.find(module)


@pytest.mark.parametrize("cls", [LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, Gemma2MLP])
def test_families_that_share_the_mlp_share_its_wrapper(cls):
    assert found(cls) is GatedMLP


@pytest.mark.parametrize("cls", LAYERS)
def test_families_that_share_the_layer_share_its_wrapper(cls):
    assert found(cls) is DecoderLayer


@pytest.mark.parametrize("cls", [Phi3MLP, Phi3DecoderLayer, Gemma2DecoderLayer])
def test_families_whose_forward_says_anything_else_are_left_alone(cls):
    assert found(cls) is None


class Copied(nn.Module):
    """A family that copied LlamaMLP to the letter."""

    def forward(self, x):
        # a comment is not part of it
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Dropping(nn.Module):
    """One that differs by a dropout."""

    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return nn.functional.dropout(down_proj, 0.1, self.training)


class Renamed(nn.Module):
    """One whose argument has another name, which a caller may use."""

    def forward(self, y):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(y)) * self.up_proj(y))
        return down_proj


class DroppingLlama(LlamaMLP):
    """A subclass with another forward: standing in for it would undo that."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class PlainLlama(LlamaMLP):
    """A subclass that changes nothing of the forward."""


@pytest.mark.parametrize(
    ("cls", "wrapper"),
    [(Copied, GatedMLP), (Dropping, None), (Renamed, None), (DroppingLlama, None), (PlainLlama, GatedMLP)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrapper_that_replaces_a_forward_wants_it_to_the_letter(cls, wrapper):
    assert found(cls) is wrapper


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_wrapper_that_calls_the_forward_takes_a_subclass_with_its_own():
    assert WRAPPERS.find(OwnLinear(2, 3)) is Linear


class HouseRMSNorm(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("parameters", "wrapper"),
    [
        ({"weight": torch.ones(4)}, RMSNorm),
        ({"weight": torch.ones(4, 4)}, None),
        ({"weight": torch.ones(4), "bias": torch.ones(4)}, None),
        ({}, None),
    ],
)
def test_any_rms_norm_is_known_by_its_look(parameters, wrapper):
    assert WRAPPERS.find(HouseRMSNorm(**parameters)) is wrapper


def test_norms_and_attention_of_families_without_code_of_their_own():
    assert WRAPPERS.find(LlamaRMSNorm(4)) is RMSNorm
    assert WRAPPERS.find(Qwen3Attention(Qwen3Config(**SMALL), 0)) is Attention
    assert WRAPPERS.find(Phi3DecoderLayer(Phi3Config(**SMALL), 0).self_attn) is Attention
    assert WRAPPERS.find(Gemma2DecoderLayer(Gemma2Config(**SMALL), 0).self_attn) is Attention


def test_modules_that_nobody_knows():
    assert WRAPPERS.find(nn.BatchNorm2d(3)) is None
    assert WRAPPERS.find(nn.Sequential(nn.Linear(2, 2))) is None


def test_a_wrapper_of_ones_own_goes_before_a_base():
    class Own(Linear):
        pass

    registry = WrapperRegistry("wrapper", "wrapq.wrappers")
    registry.register("torch.nn.modules.linear.Linear")(Linear)
    registry.register(f"{__name__}.OwnLinear")(Own)
    assert registry.find(OwnLinear(2, 3)) is Own
    assert registry.find(nn.Linear(2, 3)) is Linear


def test_a_copied_mlp_computes_what_it_did():
    mlp = LlamaMLP(LlamaConfig(**SMALL))
    twin = Copied()
    for name, child in copy.deepcopy(mlp).named_children():
        twin.add_module(name, child)
    x = torch.randn(2, 3, 16)
    assert torch.equal(prepare(twin)(x), mlp(x))
