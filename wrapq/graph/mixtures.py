"""Mixtures of experts: how experts and routers are recognised, by class or by name.

The experts of a layer are alike: what is traced for the first one holds for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from wrapq.wrappers.experts import Experts, can_be_taken_apart
from wrapq.wrappers.wrapper_registry import WRAPPERS

EXPERT_NAME = re.compile(r"(.*\bexperts)\.\d+\.(.*)")
"""The full name of a part of an expert that is a module, such as `model.layers.0.mlp.experts.3.up_proj`; its groups are
the experts and the part."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` keeps the weights of all experts in one tensor, as transformers does."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def holds_experts(name: str, module: nn.Module) -> bool:
    """Whether `module`, which has no wrapper, has the matrices of experts as parameters of its own, by its name or that
    of its class, and cannot be taken apart."""
    matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    alone = not is_router(module) and not can_be_taken_apart(module)
    return bool(matrices) and alone and _is_named(name, module)


def is_router(module: nn.Module) -> bool:
    """Whether `module`, which has no wrapper, is a router with a weight [E, K], by the name of its class."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")  # those of a script are no plain dict
    return weight is not None and weight.dim() == 2 and "outer" in type(module).__name__


def expert_counts(name: str, module: nn.Module) -> frozenset[int]:
    """How many experts the module called `name` holds itself, as modules or in tensors for all of them; empty where it
    holds none. Several where tensors differ, as they do where a router chooses experts too that compute nothing."""
    named = _is_named(name, module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return frozenset({len(module), getattr(module, "choices", 0)} if named and len(module) > 1 else ())
    tensors = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    stacked = [p.shape for p in tensors if p.dim() == 3]
    if not tensors or not (named or (stacked and all(1 < shape[0] <= min(shape[1:]) for shape in stacked))):
        return frozenset()
    own = {v for k, v in vars(module).items() if k.endswith("experts") and isinstance(v, int)}
    return frozenset({shape[0] for shape in stacked} | own)


def _is_named(name: str, module: nn.Module) -> bool:
    return "expert" in name.rpartition(".")[2] or "Expert" in type(module).__name__


def find_routers(model: nn.Module) -> Iterator[str]:
    """The names of the linears that choose among experts, whatever their class: in the smallest module around experts
    that has weights beside theirs, those with one output for each of them."""
    for name, module in model.named_modules():
        if not (counts := expert_counts(name, module)):
            continue
        beside: list[tuple[str, nn.Module]] = []
        outer = name
        while outer and not beside:
            outer = outer.rpartition(".")[0]
            around = model.get_submodule(outer).named_modules(prefix=outer)
            beside = [(n, m) for n, m in around if not f"{n}.".startswith(f"{name}.") and m._parameters]
        for inner, linear in beside:
            wrapper = WRAPPERS.find(linear)
            if wrapper is not None and wrapper.kind == "Linear" and wrapper.width(linear, "output") in counts:
                yield inner


class Mixtures:
    """The layers of a model whose experts are modules (`wrapq.wrappers.experts`), by the names of their parts."""

    def __init__(self, model: nn.Module) -> None:
        self._counts = {name: len(module) for name, module in model.named_modules() if isinstance(module, Experts)}

    def layer(self, name: str) -> str | None:
        """The experts of which `name` is a part of the first one; None for other modules."""
        layer, _, index = name.rpartition(".")[0].rpartition(".")
        return layer if index == "0" and layer in self._counts else None

    def names(self, name: str) -> tuple[str, ...]:
        """The names that a part `name` of the first expert has in each expert; `name` alone for other modules."""
        if (layer := self.layer(name)) is None:
            return (name,)
        return tuple(f"{layer}.{index}.{name.rpartition('.')[2]}" for index in range(self._counts[layer]))
