"""Layers that inference engines run as one, because they multiply the same input.

Such an engine has one global scale for all of them (NVFP4), so that weights which have global scales share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from wrapq.observers.forward_context import in_context
from wrapq.wrappers.base import QuantModuleBase

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""The names within one parent, as vLLM 0.33 fuses them; llm-compressor shares global scales among the same."""


def siblings(name: str) -> tuple[str, ...]:
    """The layers that the layer called `name` may be run as one with, itself included, in their order."""
    parent, dot, own = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in next((parts for parts in FUSED if own in parts), (own,)))


@contextmanager
def sharing_global_scale(name: str, modules: Mapping[str, QuantModuleBase]) -> Iterator[None]:
    """While this holds, the weight of the wrapped module `name`, and each of its groups that are rounded by themselves,
    gets the global scale of all its `siblings` in `modules` that have one too, by `ForwardContext.shared_bound`.
    """
    found = [module for sibling in siblings(name) if (module := modules.get(sibling)) is not None]
    sharing = [module for module in found if (point := module.weight_quantizer) and point.spec.global_scale]
    own = modules[name]
    alone = own not in sharing or (len(sharing) < 2 and own.wrapper.groups(own) == 1)
    bound = None if alone else _bound([module.float_weight().detach() for module in sharing])
    with in_context(shared_bound=bound):
        yield


def _bound(weights: Sequence[Tensor]) -> Tensor:
    ranges = [weight.aminmax() for weight in weights]
    return torch.stack([torch.maximum(-low, high).float().to(weights[0].device) for low, high in ranges]).amax(0, True)
