"""The experts of a mixture, which transformers keeps in one tensor for all, as linears of their own.

Each expert has its own inputs, ranges and Hessian, so that each is wrapped, calibrated and rounded like any other
linear; what a run saves has them under the names that checkpoints on the hub have, `experts.0.gate_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from wrapq.observers.forward_context import forward_context, in_context
from wrapq.runtime.module import shadow
from wrapq.runtime.rotation import ONLINE

_FIRST = ("gate_up_proj", "up_proj")
_LAYOUT = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What `transformers.integrations.moe.use_experts_implementation` gives every such class."""


class _Layout(NamedTuple):
    """How a module of transformers keeps its experts.

    Attributes:
        size: how many there are; a tensor may have rows beside theirs.
        gate: whether what reads the tokens is the gate and the other projection in one.
        plain: whether the gate is the first half of these, and used as transformers does by default.
        bias: whether they have biases.
        transposed: whether weights are [K, N].
    """

    size: int
    gate: bool
    plain: bool
    bias: bool
    transposed: bool

    @property
    def first(self) -> str:
        """The name of what reads the tokens."""
        return "gate_up_proj" if self.gate else "up_proj"


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
        layout = _layout_of(fused)
        first = layout.first
        weight, bias = _part(fused, first, index)
        if layout.gate and layout.plain:
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
    where that one keeps them transposed.

    Attributes:
        choices: how many there are for the router, which may choose some too that compute nothing.
    """

    transposed: ClassVar[bool] = False
    """Whether a class of transformers that does not say so itself keeps them transposed."""

    def __init__(self, fused: Any) -> None:
        rest = shadow(fused, type(fused))
        rest._parameters = {}
        super().__init__(Expert(fused, rest, index) for index in range(_layout_of(fused).size))
        self.choices = max(len(tensor) for tensor in fused._parameters.values() if tensor is not None)
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
        layout = _layout_of(fused)
        for index, expert in enumerate(self if layout.transposed else ()):
            *first, down = (cast(Tensor, linear.weight) for linear in expert.children())
            getattr(fused, layout.first)[index].copy_(torch.cat(first).t())
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

    def stand_in(self, x: Tensor) -> Tensor:
        """What becomes of tokens `x` if all go to the first expert, where nobody can say yet to whom they go."""
        return cast(Tensor, self[0](x))


class SortedExperts(Experts):
    """Experts of Llama 4, which get all tokens [E M, K], those for the first expert first, and zeros for the tokens
    that an expert shall not see."""

    transposed = True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """What its experts make of their tokens, and zeros for zeros."""
        total, mask = torch.zeros_like(hidden_states), forward_context().padding
        tokens = len(hidden_states) // len(self)
        real = mask.flatten() if mask is not None and mask.numel() == tokens else None
        for index, expert in enumerate(self):
            own = hidden_states[index * tokens : (index + 1) * tokens]
            rows = torch.where((own != 0).any(-1))[0]
            if len(rows):
                with in_context(padding=mask if real is None else real[rows]):
                    total[index * tokens + rows] = expert(own[rows]).to(total.dtype)
        return total


class PassingExperts(Experts):
    """Experts of LongCat, beside which there are some that return the token as it is, with numbers after theirs."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = super().forward(hidden_states, top_k_index, top_k_weights)
        passed = (top_k_weights * (top_k_index >= len(self))).sum(-1, keepdim=True)
        return total + (hidden_states * passed).to(total.dtype)

    def stand_in(self, x: Tensor) -> Tensor:
        return super().stand_in(x) + x


_OTHER = {"Llama4TextExperts": SortedExperts, "LongcatFlashExperts": PassingExperts}
"""Of transformers' classes that are not made by `use_experts_implementation`, those whose forward is known here."""


def take_apart(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Give `model`, in place, experts that are modules: those with any of `names` inside, or all; returns the model."""
    parents = (accumulate(name.split(".")[:-1], "{}.{}".format) for name in names or ())
    wanted = None if names is None else set(chain.from_iterable(parents))
    for name, module in list(model.named_modules()):
        if name and can_be_taken_apart(module) and (wanted is None or name in wanted):
            model.set_submodule(name, _OTHER.get(type(module).__name__, Experts)(module))
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
    return _layout(module) is not None


def is_transposed(module: nn.Module) -> bool | None:
    """Whether the experts in the tensors of `module` have weights [K, N] and not [N, K]; None where that is not known
    here."""
    layout = _layout(module)
    return getattr(module, "is_transposed", None) if layout is None else layout.transposed


def _layout(module: Any) -> _Layout | None:
    first = next((key for key in _FIRST if isinstance(module._parameters.get(key), nn.Parameter)), None)
    if first is None or (down := module._parameters.get("down_proj")) is None:
        return None
    if type(module).__name__ in _OTHER:
        return _Layout(len(down), True, True, False, _OTHER[type(module).__name__].transposed)
    if not all(hasattr(module, key) for key in _LAYOUT) or getattr(module, "has_post_expert_norm", False):
        return None
    plain = module.is_concatenated and type(module)._apply_gate.__module__ == "transformers.integrations.moe"
    return _Layout(module.num_experts, module.has_gate, plain, module.has_bias, module.is_transposed)


def _layout_of(fused: Any) -> _Layout:
    return cast(_Layout, _layout(fused))


def _part(fused: Any, name: str, index: int) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and bias [N] of an expert."""
    weight = getattr(fused, name)[index].detach()
    bias = getattr(fused, f"{name}_bias")[index].detach() if _layout_of(fused).bias else None
    return weight.t().contiguous() if _layout_of(fused).transposed else weight, bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
