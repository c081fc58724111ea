"""Whether an export computes what the model it was made of does, or what is off is more than rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.runtime.graph_program import GraphProgram
from wrapq.runtime.module import QuantizedModule

_LEAST = 1e-30
_ULPS, _MARGIN, _WRONG = 2.0, 2.0, 0.5
"""By how many units of the last digit numbers are changed; how many times what follows an export may be off, since it
rounds in more places; and what no rounding explains: outputs that have nothing in common are off by more than one."""


def compared(
    name: str, theirs: Sequence[Tensor], ours: Sequence[Tensor], allowed: float, again: Callable[[], Sequence[Tensor]]
) -> tuple[float, str]:
    """How far the outputs of the export called `name` are from ours, relative to the norm of ours, and a note where it
    is more than what is `allowed` and still rounding.

    A number near the middle of two steps of an activation's grid falls to either side, and what follows it is off by a
    step, so that in a deep model the least difference grows to that of quantization itself. How far it grows is
    measured: by ours again, with the inputs of what quantizes activations changed in their last digits.

    Args:
        theirs: the outputs of the export.
        ours: those of the converted model.
        allowed: what rounding explains in any model.
        again: computes ours with `last_digits_changed`; called only where that decides.

    Raises:
        ModelError: it is more than rounding explains.
    """
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"the {name} export loads, but gives {shapes[0]} where the model gives {shapes[1]}")
    if (error := _off(theirs, ours)) <= allowed:
        return error, ""
    moved = _off(again(), ours)
    if error <= min(_MARGIN * moved, _WRONG):
        return error, (
            f"its outputs are off by {error:.2g} of their norm, those of the model itself by {moved:.2g} where numbers "
            "change in their last digit and fall to the other side of a step"
        )
    raise ModelError(
        f"the {name} export loads, but computes something else: its outputs are off by {error:.2g} of their norm, "
        f"where rounding explains {max(allowed, moved):.2g}; a defect of wrapq or of the loader"
    )


@contextmanager
def last_digits_changed(model: nn.Module) -> Iterator[None]:
    """In the context, what comes to each module of `model` that quantizes activations is changed at random by about a
    unit of the last digit, as rounding elsewhere would."""
    generators: dict[torch.device, torch.Generator] = {}

    def change(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_changed(each, generators) for each in arguments)

    with ExitStack() as stack:
        for module in model.modules():
            rounds = isinstance(module, QuantizedModule) and any(point != "weight" for point in module.specs)
            if rounds or isinstance(module, GraphProgram):
                stack.callback(module.register_forward_pre_hook(change).remove)
        yield


def _changed(value: Any, generators: dict[torch.device, torch.Generator]) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value.device not in generators:
        generators[value.device] = torch.Generator(value.device).manual_seed(0)
    noise = torch.randn(value.shape, generator=generators[value.device], device=value.device)
    return (value.float() * (1 + _ULPS * torch.finfo(value.dtype).eps * noise)).to(value.dtype)


def _off(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=_LEAST)) for a, b in zip(theirs, ours, strict=True))
