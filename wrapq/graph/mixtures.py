"""Mixtures of experts: how experts and routers are recognised, by class or by name.

The experts of a layer are alike: what is traced for the first one holds for all.
"""

from __future__ import annotations

import re

from torch import nn

from wrapq.wrappers.experts import Experts

EXPERT_NAME = re.compile(r"(.*\bexperts)\.\d+\.(.*)")
"""The full name of a part of an expert that is a module, such as `model.layers.0.mlp.experts.3.up_proj`; its groups are
the experts and the part."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` keeps the weights of all experts in one tensor, as transformers does."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def is_router(module: nn.Module) -> bool:
    """Whether `module`, which has no wrapper, is a router with a weight [E, K], by the name of its class."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and "outer" in type(module).__name__


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
