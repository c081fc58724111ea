"""Weights whose rows fall into groups with inputs of their own, as those of grouped and depthwise convolutions do.

An algorithm that says so takes all groups at once. To any other each is a weight by itself, with its own statistics,
and what is chosen for them is put together along the rows, so that no scale may be shared across groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from wrapq.calibration.algorithm import Algorithm, Correction, Corrector, Rounded, Rounder, Rounding
from wrapq.calibration.blockwise import BLOCK
from wrapq.calibration.statistics import InputStatistics, UnusableStatisticsError
from wrapq.observers.base import observe_tensor
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec


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
    specs: Sequence[QuantSpec],
    where: str,
    statistics: InputStatistics | None,
    fallbacks: list[str],
) -> list[Rounded]:
    """`Rounder.round_each` for `weight` [N, K], or for each group of its rows that has an input of its own.

    Where the statistics of some groups cannot be used, these are rounded to nearest and `fallbacks` says so.

    Raises:
        UnusableStatisticsError: those of no group can be used.
    """
    if statistics is None or statistics.groups == 1 or not rounder.needs or rounder.groups_at_once:
        return _round(rounder, weight, specs, where, statistics)
    count, errors = statistics.groups, []
    done: list[list[Rounded]] = []
    for index, rows in enumerate(weight.chunk(count)):
        try:
            done.append(_round(rounder, rows, specs, where, statistics.group(index)))
        except UnusableStatisticsError as error:
            errors.append(error)
            done.append([round_to_nearest(rows, spec, where) for spec in specs])
    if len(errors) == count:
        raise errors[0]
    if errors:
        fallbacks.append(f"{errors[0]}; {len(errors)} of its {count} groups are rounded to nearest")
    return [
        Rounded(
            torch.cat([its.integers for its in parts]),
            _together([its.qparams for its in parts]),
            _combined(rounder, [its.report for its in parts]),
        )
        for parts in zip(*done, strict=True)
    ]


def _round(
    rounder: Rounder, weight: Tensor, specs: Sequence[QuantSpec], where: str, statistics: InputStatistics | None
) -> list[Rounded]:
    if len(specs) == 1:  # who changes what an algorithm does need not know of more
        return [rounder.round(weight, specs[0], where, statistics)]
    return rounder.round_each(weight, specs, where, statistics)


def correct_by_group(
    corrector: Corrector, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics
) -> Correction:
    """`Corrector.correct` for `weight` [N, K], or for each group of its rows that has an input of its own.

    Raises:
        UnusableStatisticsError: of the groups' outputs only the mean can be corrected.
    """
    if statistics.groups == 1:
        return corrector.correct(weight, error, where, statistics)
    if corrector.adds != "bias":
        raise UnusableStatisticsError(f"{where}: its groups have inputs of their own, so only a bias can correct them")
    parts = zip(weight.chunk(statistics.groups), error.chunk(statistics.groups), strict=True)
    done = [corrector.correct(*part, where, statistics.group(index)) for index, part in enumerate(parts)]
    bias = torch.cat([its.bias for its in done if its.bias is not None])
    return Correction(bias, report=_combined(corrector, [its.report for its in done]))


def _together(parts: Sequence[QParams]) -> QParams:
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    scale, zero_point = torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None
    return QParams(parts[0].spec, scale, zero_point, global_scale=parts[0].global_scale)


def _combined(algorithm: Algorithm, reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The figures for all groups."""
    figures: dict[str, list[float]] = {}
    for report in reports:
        for name, value in report.items():
            figures.setdefault(name, []).append(value)
    return {name: algorithm.combines.get(name, sum)(values) for name, values in figures.items()}
