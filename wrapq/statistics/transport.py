"""How statistics of a module's input are updated when a transform changes that input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wrapq.errors import CalibrationError
from wrapq.quant.affine import row_parts
from wrapq.runtime.rotation import OnlineRotation
from wrapq.statistics.input import InputStatistics


@dataclass(frozen=True)
class Scaled:
    """The input is now `x / factors` [K]."""

    factors: Tensor


@dataclass(frozen=True)
class Rotated:
    """Each of the `blocks`, int64 [B, D], of the input's channels is now `x Q`, `matrix` Q [D, D] being orthogonal."""

    matrix: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Shifted:
    """A constant was subtracted from the input, after which no statistic can be updated."""


InputChange = Scaled | Rotated | OnlineRotation | Shifted
"""An `OnlineRotation`: the input is now rotated at each forward."""


def transform_hessian(hessian: Tensor, changes: Sequence[InputChange]) -> Tensor | None:
    """`X^T X` [K, K] of the input after `changes`: `D^-1 H D^-1` and `Q^T H Q`, in float64; None where it is lost."""
    result = hessian.to(torch.double, copy=True)
    for change in changes:
        if isinstance(change, Shifted):
            return None
        if isinstance(change, Scaled):
            factors = change.factors.to(result)
            result = result / factors[:, None] / factors
        elif isinstance(change, OnlineRotation):
            result = change(change(result).t()).t()
        else:
            rotate_blocks_(result, -1, change.blocks, change.matrix)
            rotate_blocks_(result, 0, change.blocks, change.matrix)
    return result.to(hessian.dtype)


def rotate_blocks_(x: Tensor, axis: int, blocks: Tensor, matrix: Tensor) -> None:
    """Multiply each of the `blocks` [B, D] of the channels along `axis` of `x` by `matrix` [D, D] from the right, in
    place, in float64."""
    last, blocks = x.movedim(axis, -1), blocks.to(x.device)
    matrix = matrix.to(x.device, torch.double)
    for part in row_parts(last):
        rows = last[part]
        rows[..., blocks] = (rows[..., blocks].double() @ matrix).to(x.dtype)


def rotate_blocks(x: Tensor, axis: int, blocks: Tensor, matrix: Tensor) -> Tensor:
    """As `rotate_blocks_`, but a new tensor, differentiable and in the dtype of `x`."""
    last, blocks = x.movedim(axis, -1), blocks.to(x.device)
    return last.index_copy(-1, blocks.flatten(), (last[..., blocks] @ matrix.to(x)).flatten(-2)).movedim(-1, axis)


def transform_magnitude(values: Tensor, changes: Sequence[InputChange]) -> Tensor | None:
    """A magnitude per channel [K], such as the largest, after `changes`; None where it has to be gathered anew."""
    for change in changes:
        if not isinstance(change, Scaled):
            return None
        values = values / change.factors.to(values).abs()
    return values


def transform_extremes(values: Tensor, changes: Sequence[InputChange]) -> Tensor | None:
    """The least or greatest value per channel [K] after `changes`; None where it has to be gathered anew."""
    kept = all(isinstance(change, Scaled) and bool((change.factors > 0).all()) for change in changes)
    return transform_magnitude(values, changes) if kept else None


def transform_rows(rows: Tensor, changes: Sequence[InputChange]) -> Tensor | None:
    """Rows of the input [M, K + 1], with their numbers in the last column, after `changes`; None where lost."""
    result = rows.to(torch.double, copy=True)
    for change in changes:
        if isinstance(change, Shifted):
            return None
        if isinstance(change, Scaled):
            result[..., :-1] /= change.factors.to(result)
        elif isinstance(change, OnlineRotation):
            result[..., :-1] = change(result[..., :-1])
        else:
            rotate_blocks_(result, -1, change.blocks, change.matrix)
    return result.to(rows.dtype)


_RULES = {
    "hessian": transform_hessian,
    "sample": transform_rows,
    **dict.fromkeys(("absmax", "mean_abs"), transform_magnitude),
    **dict.fromkeys(("least", "greatest"), transform_extremes),
}


def transform_statistics(statistics: InputStatistics, changes: Sequence[InputChange], where: str) -> InputStatistics:
    """The statistics that an input would have after `changes`; raises `CalibrationError` where one of them has to be
    gathered anew."""
    updated = InputStatistics(statistics.needs)
    updated.rows, updated.complete = statistics.rows, statistics.complete
    for name, value in statistics.sums.items():
        after = _RULES[name](value, changes) if name in _RULES else None
        if after is None:
            raise CalibrationError(f"{where}: its {name} cannot be carried over what changed its input")
        updated.sums[name] = after
    return updated
