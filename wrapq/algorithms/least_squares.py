"""Scales, and minima, by least squares that count each column by the mean square of what it multiplies.

The error of a layer's output, as far as its inputs do not depend on each other, is `sum_j h_j (w_j - v_j)^2` for the
diagonal h of the Hessian, llama.cpp's importance matrix. For codes q the best scale and minimum of a group, in
`v = scale q - minimum`, have a closed form, and then codes are rounded anew, as `make_qkx3_quants` and
`make_qx_quants` of its `ggml/src/ggml-quants.c` do it. Those round the scales of super-blocks to integers at last; here
the integers, and the steps that they are multiplied with, are chosen by the same error.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS, Rounded, Rounder
from wrapq.algorithms.seqmse import unread_observer
from wrapq.observers.base import checked_qparams
from wrapq.quant.affine import reduce_range, split_groups
from wrapq.quant.dtypes import dtype_named
from wrapq.quant.qparams import QParams
from wrapq.quant.rounded_scales import TINY, round_minimum, round_scale
from wrapq.quant.spec import QuantSpec
from wrapq.quant.super_blocks import put_together, round_codes, rounded_step, split_super, taken_apart
from wrapq.statistics.input import InputStatistics

_SHARES = (*(1.06 - 0.02 * i for i in range(8)), *(0.88 - 0.06 * i for i in range(6)))
"""The scales that are tried first, relative to that of the whole range."""
_FEW_BITS = 4
"""With which it matters on which side the odd level lies, so that scales of both signs are tried."""
_LEAST_SHARE = 1e-6
"""Of the mean importance, what a column without data has."""
_SWEEPS = 2
"""How often integers and steps of super-blocks are chosen in turn: more gain a hundredth."""
_PIECE = 1 << 16  # elements that are fitted at once on a CPU: what stays in a core's cache


@ALGORITHMS.register("least_squares")
class LeastSquares(Rounder):
    """Rounding to nearest, in scales and minima by least squares over each group."""

    needs = ("mean_square",)

    def unsupported(self, spec: QuantSpec) -> str | None:
        return unfitted(spec) or unread_observer(spec)

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        importance = (statistics or InputStatistics()).get("mean_square", where)
        qparams = fitted_ranges(weight, spec, importance, where)
        return Rounded(qparams.quantize(weight), qparams)


def unfitted(spec: QuantSpec) -> str | None:
    """Why scales of `spec` are not found by least squares; None where they are."""
    if spec.dtype.kind != "int" or spec.dtype.signed != spec.symmetric or spec.granularity != "group":
        return "it fits scales of groups of integers, symmetric signed ones or unsigned ones with minima"
    if not spec.symmetric and spec.zero_point != "min":
        return "it finds minima and not zero points: add zero=min"
    if spec.scale_dtype in ("e8m0", "fp8_e4m3"):
        return "its scales have too few values to be fitted"
    return None


def fitted_ranges(weight: Tensor, spec: QuantSpec, importance: Tensor, where: str) -> QParams:
    """The parameters with which `weight` [N, K] loses least, by the `importance` [K] of its columns; raises
    `CalibrationError`, beginning with `where`, for NaN or infinity in the weight."""
    weight, mean = weight.float(), float(importance.mean())
    whole = checked_qparams(*reduce_range(weight, spec), spec, where)
    shares = importance.float() / mean if mean else torch.ones_like(importance, dtype=torch.float32)
    columns, minima = split_groups(shares.clamp(min=_LEAST_SHARE), spec).t()[:, None].contiguous(), whole.zero_point
    rows = max(1, _PIECE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    found: list[_Fit] = []
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        groups = _Groups(split_groups(weight[part], spec).movedim(-1, 0).contiguous(), columns, spec)
        scale = whole.scale[part]
        found.append(groups.fitted(scale, torch.zeros_like(scale) if minima is None else minima[part]))
    scale, minimum = torch.cat([fit.scale for fit in found]), torch.cat([fit.minimum for fit in found])
    return QParams(spec, scale, None if minima is None else minimum)


class _Fit(NamedTuple):
    """Scales and minima of groups [n, G], and their errors."""

    scale: Tensor
    minimum: Tensor
    error: Tensor

    def or_better(self, other: _Fit, together: int = 1) -> _Fit:
        """For so many groups `together` the one that loses less."""
        gained = (self.error - other.error).unflatten(-1, (-1, together)).sum(-1) > 0
        better = gained.repeat_interleave(together, -1)
        return _Fit(*(torch.where(better, new, old) for new, old in zip(other, self, strict=True)))


class _Groups:
    """Groups of weights `x` [g, n, G], whose elements count as much as `h` [g, 1, G] says: sums over the first axis are
    fast."""

    def __init__(self, x: Tensor, h: Tensor, spec: QuantSpec) -> None:
        self.x, self.h, self.spec = x, h, spec
        self.hx = (x * h).sum(0)
        self.free_minimum = not spec.symmetric
        self.least = 0.0 if spec.super_blocks else -torch.inf  # of minima

    def fitted(self, scale: Tensor, minimum: Tensor) -> _Fit:
        """The best there is, begun from the parameters of the whole range, which it is no worse than."""
        spec = self.spec
        whole = best = self.tried(scale, minimum)
        both = spec.signed_scale and spec.dtype.bits <= _FEW_BITS
        for share in (*_SHARES, *(-share for share in _SHARES if both)):
            best = best.or_better(self.tried(*self.solved(self.codes(scale * share, minimum), scale, minimum)))
        for _ in range(2):
            best = best.or_better(self.tried(*self.solved(self.codes(*best[:2]), *best[:2])))
        if not spec.super_blocks:
            sign = torch.where(best.scale < 0, -1.0, 1.0)
            rounded = round_minimum(best.minimum, spec) if self.free_minimum else best.minimum
            return whole.or_better(self.tried(round_scale(best.scale.abs(), spec) * sign, rounded))
        rounded = round_minimum(best.minimum, spec) if self.free_minimum else best.minimum
        fit = self.tried(round_scale(best.scale, spec), rounded)
        for _ in range(_SWEEPS):
            fit = self.swept(fit)
        return whole.or_better(fit, spec.groups_at_once)

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The codes nearest to the weights, float32 [g, n, G]."""
        dtype = self.spec.dtype
        return (self.x + minimum).div_(scale).round_().clamp_(dtype.qmin, dtype.qmax)

    def tried(self, scale: Tensor, minimum: Tensor) -> _Fit:
        """These parameters with their error."""
        lost = self.codes(scale, minimum).mul_(scale).sub_(minimum).sub_(self.x)
        return _Fit(scale, minimum, lost.square_().mul_(self.h).sum(0))

    def solved(self, q: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """The best parameters for codes; those given where none are usable."""
        hq = q * self.h
        qx, qq = (hq * self.x).sum(0), (hq * q).sum(0)
        alone = qx / qq.clamp(min=TINY)
        if not self.free_minimum:
            usable = (qq > 0) & (alone.abs() > TINY) & (self.spec.signed_scale | (alone > 0))
            return torch.where(usable, alone, scale), minimum
        h, x, ones = self.h.sum(0), self.hx, hq.sum(0)
        split = h * qq - ones.square()
        fit, low = (h * qx - x * ones) / split, (ones * qx - qq * x) / split
        bounded = low < self.least
        fit, low = torch.where(bounded, alone, fit), torch.where(bounded, 0.0, low)
        usable = (split > 1e-6 * h * qq) & (fit > TINY)
        return torch.where(usable, fit, scale), torch.where(usable, low, minimum)

    def swept(self, fit: _Fit) -> _Fit:
        """`fit` with better integers for its steps, and then better steps for the integers."""
        spec, kind = self.spec, dtype_named(self.spec.scale_dtype)
        (levels, step), (lows, low_step) = (taken_apart(t, spec) for t in fit[:2])
        for up, low_up in product((-1, 1, 0), (-1, 1, 0) if self.free_minimum else (0,)):
            if up or low_up:
                scale = put_together(round_codes(levels + up, kind, 1), step, spec)
                lower = put_together(round_codes(lows + low_up, kind, 0), low_step, spec)
                fit = fit.or_better(self.tried(scale, lower))
        return fit.or_better(self.tried(*self._stepped(fit, step, low_step)), spec.groups_at_once)

    def _stepped(self, fit: _Fit, step: Tensor, low_step: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters of `fit` with the best steps for its integers and codes."""
        spec, q = self.spec, self.codes(*fit[:2])
        a, b = q * fit.scale, fit.minimum.expand_as(q)  # x ~ r a - t b

        def sums(left: Tensor, right: Tensor) -> Tensor:
            return split_super((left * right * self.h).sum(0), spec).sum(-1, keepdim=True)

        aa, ax = sums(a, a), sums(a, self.x)
        r, t = ax / aa.clamp(min=TINY), torch.ones_like(aa)
        if self.free_minimum:
            ab, bb, bx = sums(a, b), sums(b, b), sums(b, self.x)
            split = aa * bb - ab.square()
            usable = split > 1e-6 * aa * bb
            r = torch.where(usable, (ax * bb - ab * bx) / split, r)
            t = torch.where(usable, (ab * ax - aa * bx) / split, t)
        return self._times(fit.scale, step, r), self._times(fit.minimum, low_step, t)

    def _times(self, values: Tensor, step: Tensor, factor: Tensor) -> Tensor:
        """`values` [n, G], integers times `step` [n, S], with a step that is `factor` [n, S, 1] times as large."""
        old = step.float()[..., None]
        new = torch.where(factor > 0, rounded_step(old * factor), old)
        return (new * (split_super(values, self.spec) / old).round()).flatten(-2)
