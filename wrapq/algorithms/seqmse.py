"""Ranges chosen by the error they cause in the layer's output.

For an error `D = Q(W) - W` and the Hessian `H = X^T X` of what the weight is multiplied with, the squared error of the
output is `tr(D H D^T)`, so that candidates are compared without running the model. The candidates are those of SeqMSE
as in AIMET: the whole range of the weights, shrunk step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.observers.base import checked_qparams
from wrapq.observers.mse import MX_FACTORS
from wrapq.quant.affine import range_to_qparams, reduce_range
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import DEFAULT_OBSERVER, QuantSpec
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics, quadratic

_PIECE = 1 << 18  # elements that are searched at once on a CPU: what stays in a core's cache


class SeqMSEOptions(Options):
    """Options of SeqMSE."""

    candidates: int = Field(20, ge=1, description="How many ranges are tried.")
    smallest: float = Field(0.4, gt=0, le=1, description="The smallest one, relative to the range of the weights.")


@ALGORITHMS.register("seqmse")
class SeqMSE(Rounder):
    """Rounding to nearest in the ranges that cost the layer's output least."""

    Options = SeqMSEOptions
    options: SeqMSEOptions
    needs = ("hessian",)
    groups_at_once = True  # a thousand weights of a depthwise channel take as long as a few

    def unsupported(self, spec: QuantSpec) -> str | None:
        return unread_observer(spec)

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        matrix = (statistics or InputStatistics()).get("hessian", where)
        qparams = search_ranges(weight, spec, matrix, where, self.options.candidates, self.options.smallest)
        return Rounded(qparams.quantize(weight), qparams)


def unread_observer(spec: QuantSpec) -> str | None:
    """Why ranges searched by their output error do not go with the observer of `spec`; None with the default one."""
    if spec.observer == DEFAULT_OBSERVER:
        return None
    return f"it chooses the ranges itself, so that the observer {spec.observer} would have no effect"


def search_ranges(
    weight: Tensor, spec: QuantSpec, hessian: Tensor, where: str, candidates: int = 20, smallest: float = 0.4
) -> QParams:
    """For each scale of `weight` [N, K] the range, among `candidates`, with the least output error under `hessian`
    [K, K], or those [G, K, K] of G groups of rows; see `best_ranges`."""
    measures, together = [output_error(hessian, spec)], hessian.dim() == 3
    return best_ranges(weight, spec, where, measures, candidates, smallest, together)[0]


Measure = Callable[[Tensor], Tensor]
"""An error for each row of each run of columns that share scales, [G, N], of differences [G, N, g]."""


def best_ranges(
    weight: Tensor,
    spec: QuantSpec,
    where: str,
    measures: Sequence[Measure],
    candidates: int,
    smallest: float,
    together: bool = False,
) -> list[QParams]:
    """For each scale of `weight` [N, K] the range, among `candidates`, with the least error by each of `measures`.

    Each scale is judged by what its own elements add to the error. Scales that are powers of two are tried at twice the
    range, the whole, a half and a quarter, whatever `candidates` and `smallest`. A global scale is that of the whole
    range. `together` gives `measures` all rows at a time, which are not alike to them.
    Raises `CalibrationError` for NaN or infinity, `SpecError` for a group size that does not divide K.
    """
    weight = weight.float()
    low, high = reduce_range(weight, spec)
    whole = checked_qparams(low, high, spec, where)
    factors = MX_FACTORS if spec.scale_dtype == "e8m0" else torch.linspace(1, smallest, candidates).tolist()
    by_row = not together and weight.device.type == "cpu" and tile(weight.shape, spec)[0] == 1
    rows = max(1, _PIECE // weight.shape[1]) if by_row else len(weight)
    ends = zip(low.split(rows), high.split(rows), strict=True) if by_row else [(low, high)]
    pieces = zip(weight.split(rows), ends, strict=True)
    found = [_search(part, *span, whole, measures, factors) for part, span in pieces]
    return [_scaled(low, high, torch.cat(factor), whole) for factor in zip(*found, strict=True)]


def _search(
    weight: Tensor, low: Tensor, high: Tensor, whole: QParams, measures: Sequence[Measure], factors: Sequence[float]
) -> list[Tensor]:
    """For each of `measures` the best of `factors` for each range, the first of equals."""
    tall, wide = tile(weight.shape, whole.spec)
    least, chosen = [torch.full_like(low, torch.inf) for _ in measures], [torch.ones_like(low) for _ in measures]
    for factor in factors:
        difference = _scaled(low, high, factor, whole).fake_quantize(weight).sub_(weight)
        parts = _filled(difference, wide).unflatten(1, (-1, wide)).transpose(0, 1)  # [G, N, g]
        for i, measure in enumerate(measures):
            errors = measure(parts)
            errors = _filled(errors, tall).unflatten(1, (-1, tall)).sum(-1).t().reshape(low.shape)
            better = errors < least[i]
            chosen[i].masked_fill_(better, factor)
            torch.minimum(least[i], errors, out=least[i])
    return chosen


def _filled(x: Tensor, size: int) -> Tensor:
    """`x` with zeros up to a multiple of `size` columns; padding by none would copy it."""
    missing = -x.shape[1] % size
    return pad(x, (0, missing)) if missing else x


def output_error(hessian: Tensor, spec: QuantSpec) -> Measure:
    """`d H d^T` of each difference d, by its columns' block of `hessian` [K, K], or [J, K, K] of J groups of rows."""
    columns = hessian.shape[-1]
    wide = tile((1, columns), spec)[1]
    if wide >= columns:
        return lambda parts: quadratic(parts[0], hessian)[None]
    missing = -columns % wide
    blocks = pad(hessian, (0, missing, 0, missing)).unflatten(-2, (-1, wide)).unflatten(-1, (-1, wide))
    blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, 0).contiguous()  # [G, g, g] or [G, J, g, g]

    def measure(parts: Tensor) -> Tensor:
        rows = parts if blocks.dim() == 3 else parts.unflatten(1, (blocks.shape[1], -1))
        return (rows @ blocks).mul_(rows).sum(-1).reshape(parts.shape[:2])

    return measure


def weight_error(parts: Tensor) -> Tensor:
    """The squares of the differences."""
    return parts.square().sum(-1)


def _scaled(low: Tensor, high: Tensor, factor: Tensor | float, whole: QParams) -> QParams:
    """The parameters of ranges multiplied with `factor`, relative to the global scale of the `whole` ones."""
    scale, zero_point = range_to_qparams(low * factor, high * factor, whole.spec, whole.global_scale)
    return QParams(whole.spec, scale, zero_point, global_scale=whole.global_scale)


def tile(shape: Sequence[int], spec: QuantSpec) -> tuple[int, int]:
    """Rows and columns of a matrix of `shape` [N, K] that share a scale."""
    rows, columns = shape
    if spec.granularity == "block":
        return spec.block_size or (1, 1)
    if spec.granularity == "group":
        return 1, spec.group_size or 1
    if spec.granularity == "channel":
        return (1, columns) if (spec.axis or 0) % 2 == 0 else (rows, 1)
    return rows, columns
