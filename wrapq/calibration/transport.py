"""How statistics of a module's input go along when a transform changes that input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wrapq.calibration.statistics import InputStatistics
from wrapq.errors import CalibrationError
from wrapq.runtime.rotation import OnlineRotation


@dataclass(frozen=True)
class Scaled:
    """The input is now `x / factors` [K]."""

    factors: Tensor


@dataclass(frozen=True)
class Rotated:
    """Each block of the input's channels is now `x Q`, Q [D, D] orthogonal.

    Attributes:
        blocks: int64 [B, D], the channels of each; those of none are as they were.
    """

    matrix: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Turned:
    """The input is now turned at each forward."""

    rotation: OnlineRotation


@dataclass(frozen=True)
class Shifted:
    """A constant was taken from the input: nothing that was gathered before can be carried over."""


Transport = Scaled | Rotated | Turned | Shifted


def carry_hessian(hessian: Tensor, edits: Sequence[Transport]) -> Tensor | None:
    """`X^T X` [K, K] of the input after `edits`: `D^-1 H D^-1` and `Q^T H Q`, in float64; None where it is lost."""
    carried = hessian.to(torch.double, copy=True)
    for edit in edits:
        if isinstance(edit, Shifted):
            return None
        if isinstance(edit, Scaled):
            factors = edit.factors.to(carried)
            carried = carried / factors[:, None] / factors
        elif isinstance(edit, Turned):
            carried = edit.rotation(edit.rotation(carried).t()).t()
        else:
            turn(carried, -1, edit.blocks, edit.matrix)
            turn(carried, 0, edit.blocks, edit.matrix)
    return carried.to(hessian.dtype)


def turn(x: Tensor, axis: int, blocks: Tensor, matrix: Tensor) -> None:
    """Multiply each of the `blocks` [B, D] of what lies along `axis` of `x` by `matrix` [D, D] from the right, in
    place, in float64."""
    last, blocks = x.movedim(axis, -1), blocks.to(x.device)
    last[..., blocks] = (last[..., blocks].double() @ matrix.to(x.device, torch.double)).to(x.dtype)


def turned(x: Tensor, axis: int, blocks: Tensor, matrix: Tensor) -> Tensor:
    """What `turn` makes of `x`, as another tensor, differentiable and in the dtype of `x`."""
    last, blocks = x.movedim(axis, -1), blocks.to(x.device)
    return last.index_copy(-1, blocks.flatten(), (last[..., blocks] @ matrix.to(x)).flatten(-2)).movedim(-1, axis)


def carry_magnitude(values: Tensor, edits: Sequence[Transport]) -> Tensor | None:
    """A magnitude for each channel [K], such as the largest, after `edits`; None where only gathering anew tells it."""
    for edit in edits:
        if not isinstance(edit, Scaled):
            return None
        values = values / edit.factors.to(values).abs()
    return values


def carry(statistics: InputStatistics, edits: Sequence[Transport], where: str) -> InputStatistics:
    """What was gathered of an input, as it would be after `edits`.

    Raises:
        CalibrationError: a part of it can only be gathered anew.
    """
    carried = InputStatistics(statistics.needs)
    carried.rows, carried.complete = statistics.rows, statistics.complete
    for name, value in statistics.sums.items():
        moved = {"hessian": carry_hessian, "absmax": carry_magnitude, "mean_abs": carry_magnitude}
        after = moved[name](value, edits) if name in moved else None
        if after is None:
            raise CalibrationError(f"{where}: its {name} cannot be carried over what changed its input")
        carried.sums[name] = after
    return carried
