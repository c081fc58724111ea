"""Weights whose rows fall into groups with inputs of their own, as those of grouped and depthwise convolutions do.

An algorithm that says so takes all groups at once. To any other each is a weight by itself, with its own statistics,
and what is chosen for them is put together along the rows, so that no scale may be shared across groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from wrapq.algorithms.base import BLOCK, Algorithm, Correction, Corrector, Rounded, Rounder, Rounding
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics, UnusableStatisticsError


def unsupported(rounding: Rounding, spec: QuantSpec, rows: int, groups: int) -> str | None:
    """Why `rounding` cannot round a weight of so many `rows`, in `groups`, to `spec`; None when it can."""
    at_once = isinstance(rounding, Rounder) and rounding.groups_at_once
    if groups > 1 and not at_once and set(rounding.needs) - {BLOCK} and _crosses(spec, rows // groups):
        return (
            "groups of a convolution have inputs of their own and are rounded each by itself, so that they cannot "
            "share scales: give each row its own, by channel or by group, or blocks whose rows divide those of a group"
        )
    return rounding.unsupported(spec)


def _crosses(spec: QuantSpec, rows: int) -> bool:
    """Whether groups of `rows` rows share scales."""
    if spec.granularity == "block":
        return rows % (spec.block_size or (1, 1))[0] != 0
    return spec.granularity == "tensor" or (spec.granularity == "channel" and (spec.axis or 0) % 2 == 1)


def round_to_nearest(weight: Tensor, spec: QuantSpec, where: str) -> Rounded:
    """What becomes of a weight [N, K] whose statistics cannot be used."""
    qparams = observe_tensor(weight, spec, where)
    return Rounded(qparams.quantize(weight), qparams, {"fallback": 1.0})


def round_by_group(
    rounder: Rounder,
    weight: Tensor,
    spec: QuantSpec,
    where: str,
    statistics: InputStatistics | None,
    fallbacks: list[str],
) -> Rounded:
    """`Rounder.round` for `weight` [N, K], or for each group of its rows that has an input of its own.

    What has statistics that cannot be used is rounded to nearest, and `fallbacks` says so.
    """
    each, errors = [statistics], []
    if statistics is not None and rounder.needs and not rounder.groups_at_once and statistics.groups > 1:
        each = [statistics.group(index) for index in range(statistics.groups)]
    done: list[Rounded] = []
    for rows, own in zip(weight.chunk(len(each)), each, strict=True):
        try:
            done.append(rounder.round(rows, spec, where, own))
        except UnusableStatisticsError as error:
            errors.append(error)
            done.append(round_to_nearest(rows, spec, where))
    if len(errors) == len(each):
        fallbacks.append(f"{errors[0]}; it is rounded to nearest")
        return round_to_nearest(weight, spec, where)
    if errors:
        fallbacks.append(f"{errors[0]}; {len(errors)} of its {len(each)} groups are rounded to nearest")
    if len(each) == 1:
        return done[0]
    parts = [part.qparams for part in done]
    scale, zeros = torch.cat([part.scale for part in parts]), [p.zero_point for p in parts if p.zero_point is not None]
    zero_point = torch.cat(zeros) if zeros else None
    qparams = QParams(parts[0].spec, scale, zero_point, global_scale=parts[0].global_scale)
    report = _combined(rounder, [part.report for part in done])
    return Rounded(torch.cat([part.integers for part in done]), qparams, report)


def correct_by_group(
    corrector: Corrector, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics
) -> Correction:
    """`Corrector.correct` for `weight` [N, K], or for each group of its rows that has an input of its own; raises
    `UnusableStatisticsError` where more than the mean of the groups' outputs is to be corrected."""
    if statistics.groups == 1:
        return corrector.correct(weight, error, where, statistics)
    if corrector.adds != "bias":
        raise UnusableStatisticsError(f"{where}: its groups have inputs of their own, so only a bias can correct them")
    parts = zip(weight.chunk(statistics.groups), error.chunk(statistics.groups), strict=True)
    done = [corrector.correct(*part, where, statistics.group(index)) for index, part in enumerate(parts)]
    bias = torch.cat([part.bias for part in done if part.bias is not None])
    return Correction(bias, report=_combined(corrector, [part.report for part in done]))


def _combined(algorithm: Algorithm, reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    figures = {name: [report[name] for report in reports if name in report] for name in dict.fromkeys(chain(*reports))}
    return {name: algorithm.combines.get(name, sum)(values) for name, values in figures.items()}
