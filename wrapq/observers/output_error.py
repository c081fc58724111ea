"""The range of a module's input with which its output is least wrong."""

from __future__ import annotations

from operator import itemgetter
from typing import Self

import torch
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.observers.base import OBSERVERS, InputConsumer, all_finite, keep_rows, numbered
from wrapq.observers.minmax import MinMax
from wrapq.quant.affine import fake_quantize_elements, range_to_qparams
from wrapq.quant.spec import QuantSpec

_ROWS = 512
_WIDE = 512
"""Outputs of which there are more are mixed to so many: the lengths of errors stay nearly what they are (the lemma of
Johnson and Lindenstrauss)."""
_COARSE = tuple(2 ** (-step / 2) for step in range(13))
_FINE = tuple(2 ** (step / 8) for step in (2, -2, 1, -1))


@OBSERVERS.register("output_error")
class LeastOutputError(MinMax):
    """The range `[f low, g high]` for which the rows of a sample, quantized, move the output of the module that reads
    them least: `sum |(Q(x) - x) W^T|^2 / |x W^T|^2`, each row relative to its own output, since norms behind many
    layers make small rows large again. One side after the other is tried at 1 to 1/64 of what was seen, then in smaller
    steps; of symmetric grids both at once.

    Raises:
        SpecError: the spec has more than one scale.
    """

    in_parts = False
    STATE = (*MinMax.STATE, "rows")
    needs_consumer = True
    rows: Tensor

    def __init__(self, spec: QuantSpec, options: object = None) -> None:
        super().__init__(spec, options)
        if spec.granularity != "tensor":
            raise SpecError(f"{spec}: output_error chooses one range for the whole input, of granularity tensor")

    def update(self, x: Tensor) -> None:
        super().update(x)
        if x.numel():
            self._keep(numbered(self._consumer().matrix(x.detach()).float(), self.batch))

    def merge(self, other: Self) -> None:
        super().merge(other)
        if not other.empty:
            self._keep(other.rows)

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def _keep(self, rows: Tensor) -> None:
        held: Tensor | None = self.rows
        self.rows = keep_rows(rows if held is None else torch.cat([held, rows.to(held.device)], -2), _ROWS)

    def _consumer(self) -> InputConsumer:
        if self.consumer is None:
            raise SpecError(f"{self.spec}: output_error is for inputs that a weight multiplies")
        return self.consumer

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.bounds()
        if not all_finite(low, high):
            return low, high
        x, weight = self.rows[..., :-1], mixed(self._consumer().weight().float())
        outputs = (x @ weight).square().sum(-1)
        power = outputs.clamp(min=1e-6 * float(outputs.mean()) or 1.0)

        def error(f: float, g: float) -> float:
            quantized = fake_quantize_elements(x, *range_to_qparams(f * low, g * high, self.spec), self.spec.dtype)
            return float((((quantized - x) @ weight).square().sum(-1) / power).sum(dtype=torch.float64))

        best, sides = (error(1.0, 1.0), 1.0, 1.0), ((1, 1),) if self.spec.symmetric else ((0, 1), (1, 0))
        for steps in (_COARSE, _FINE, _FINE):
            for down, up in sides:
                tried = [(min(1.0, best[1] * step**down), min(1.0, best[2] * step**up)) for step in steps]
                best = min([best, *((error(f, g), f, g) for f, g in tried)], key=itemgetter(0))
        return best[1] * low, best[2] * high


def mixed(weight: Tensor) -> Tensor:
    """`weight` [N, K] or [G, N, K] transposed, [..., K, N], of at most 512 outputs."""
    if weight.shape[-2] > _WIDE:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (_WIDE, weight.shape[-2]), generator=generator).to(weight) * 2 - 1
        weight = signs @ weight * _WIDE**-0.5
    return weight.mT
