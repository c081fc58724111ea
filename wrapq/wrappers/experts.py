"""The experts of a mixture, which transformers keeps in one tensor for all, as linears of their own.

Each expert has its own inputs, ranges and Hessian, so that each is wrapped, calibrated and rounded like any other
linear; what a run saves has them under the names that checkpoints on the hub have, `experts.0.gate_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrapq.observers.forward_context import forward_context, in_context
from wrapq.runtime.module import shadow
from wrapq.runtime.rotation import ONLINE

_FIRST = ("gate_up_proj", "up_proj")
_LAYOUT = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What `transformers.integrations.moe.use_experts_implementation` gives every such class."""


class Expert(nn.Module):
    """One expert: `down_proj` of what `gate_proj` and `up_proj` give, or an interleaved `gate_up_proj`, or `up_proj`
    alone.

    Args:
        fused: the module of transformers, with its tensors.
        rest: the same without them, for its activation.
        index: which expert.
    """

    rest: Any
    gate_up_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, fused: Any, rest: Any, index: int) -> None:
        super().__init__()
        self.__dict__["rest"] = rest  # shared by all experts, and none's child
        first = _first(fused)
        weight, bias = _part(fused, first, index)
        if fused.has_gate and _is_plain(fused):
            biases = (None, None) if bias is None else bias.chunk(2)
            self.gate_proj, self.up_proj = (_linear(*part) for part in zip(weight.chunk(2), biases, strict=True))
        else:
            self.add_module(first, _linear(weight, bias))
        self.down_proj = _linear(*_part(fused, "down_proj", index))

    def forward(self, x: Tensor) -> Tensor:
        if "gate_proj" in self._modules:
            inner = self.rest.act_fn(self.gate_proj(x)) * self.up_proj(x)
        elif "gate_up_proj" in self._modules:
            inner = self.rest._apply_gate(self.gate_up_proj(x))
        else:
            inner = self.rest.act_fn(self.up_proj(x))
        return cast(Tensor, self.down_proj(inner))


class Experts(nn.ModuleList):
    """All experts of a layer, in the place of transformers' module; its weights are views of that one's, but for copies
    where that one keeps them transposed."""

    def __init__(self, fused: Any) -> None:
        rest = shadow(fused, type(fused))
        rest._parameters = {}
        super().__init__(Expert(fused, rest, index) for index in range(fused.num_experts))
        self.train(fused.training)
        self.__dict__["fused"] = fused  # no child: its tensors are not the model's meanwhile

    @property
    def rotates(self) -> bool:
        """Whether a linear of an expert rotates its input at each forward."""
        return any(ONLINE in linear._modules for expert in self for linear in expert.children())

    @torch.no_grad()
    def write_back(self) -> None:
        """Give transformers' module what was changed in the copies."""
        fused: Any = self.fused
        for index, expert in enumerate(self if fused.is_transposed else ()):
            *first, down = (cast(Tensor, linear.weight) for linear in expert.children())
            getattr(fused, _first(fused))[index].copy_(torch.cat(first).t())
            fused.down_proj[index].copy_(down.t())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of what its experts make of each token [M, K], weighted, as transformers' own forward has it."""
        total, mask = torch.zeros_like(hidden_states), forward_context().padding
        real = mask.flatten() if mask is not None and mask.numel() == len(hidden_states) else None
        for index, expert in enumerate(self):
            rows, places = torch.where(top_k_index == index)
            if not len(rows):
                continue  # it sees nothing, rather than no tokens
            with in_context(padding=mask if real is None else real[rows]):
                y = expert(hidden_states[rows])
            total.index_add_(0, rows, (y * top_k_weights[rows, places, None]).to(total.dtype))
        return total


def take_apart(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Give `model`, in place, experts that are modules: those with any of `names` inside, or all; returns the model."""
    parents = (accumulate(name.split(".")[:-1], "{}.{}".format) for name in names or ())
    wanted = None if names is None else set(chain.from_iterable(parents))
    for name, module in list(model.named_modules()):
        if name and can_be_taken_apart(module) and (wanted is None or name in wanted):
            model.set_submodule(name, Experts(module))
    return model


def put_together(model: nn.Module) -> nn.Module:
    """Undo `take_apart`: the modules of transformers come back, with the weights that the experts have by now. Experts
    that rotate what comes to them at each forward, which those modules do not, stay as they are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts) and "fused" in module.__dict__ and not module.rotates:
            module.write_back()
            model.set_submodule(name, cast(nn.Module, module.fused))
    return model


@contextmanager
def apart(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[nn.Module]:
    """While this holds, experts of `model` are modules: those with any of `names` inside, or all."""
    try:
        yield take_apart(model, names)
    finally:
        put_together(model)


def forget_fused(model: nn.Module) -> None:
    """Let go of the tensors that `put_together` would need."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.__dict__.pop("fused", None)


def can_be_taken_apart(module: nn.Module) -> bool:
    """Whether `module` is transformers' kind of experts, of a layout that is known here."""
    if isinstance(module, torch.jit.ScriptModule):  # whose tables are not those of a module
        return False
    first = next((key for key in _FIRST if isinstance(module._parameters.get(key), nn.Parameter)), None)
    known = first is not None and module._parameters.get("down_proj") is not None
    return known and all(hasattr(module, key) for key in _LAYOUT) and not getattr(module, "has_post_expert_norm", False)


def _first(fused: Any) -> str:
    """The name of what reads the tokens."""
    return "gate_up_proj" if fused.has_gate else "up_proj"


def _is_plain(fused: Any) -> bool:
    """Whether the gate is the first half of the rows, and used as transformers does by default."""
    return fused.is_concatenated and type(fused)._apply_gate.__module__ == "transformers.integrations.moe"


def _part(fused: Any, name: str, index: int) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and bias [N] of an expert."""
    weight = getattr(fused, name)[index].detach()
    bias = getattr(fused, f"{name}_bias")[index].detach() if fused.has_bias else None
    return weight.t().contiguous() if fused.is_transposed else weight, bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
