"""Activations as int8 or fp8, for kernels that multiply such numbers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wrapq.quant.affine import LARGEST, TINY
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.kernel import has_plain_scales

if TYPE_CHECKING:
    from wrapq.runtime.module import QuantizedWeight

_MIDDLE = 128
"""A uint8 grid is held as int8, 128 lower."""


@dataclass(frozen=True)
class QuantizedActivation:
    """`x ~ (q - zero) * scale`: q int8 or float8_e4m3fn [M, K], zero a plain integer; scale float32 [1], [M, 1] or, for
    groups, [M, K / g]."""

    q: Tensor
    scale: Tensor
    zero: int


class ActivationQuantizer:
    """The numbers that a point's fake quantization rounds to, bit for bit, as int8 or float8_e4m3fn.

    Projections that read the same tensor one after the other (query, key, value) share them.

    Args:
        spec: integers of at most 8 bits or fp8_e4m3: dynamic and symmetric per token, group or tensor, or static per
            tensor.
        qparams: the fixed parameters; None for a dynamic spec.
    """

    def __init__(self, spec: QuantSpec, qparams: QParams | None) -> None:
        self.granularity, self.group = spec.granularity, spec.group_size
        self.is_int, self.half_range = spec.dtype.kind == "int", spec.dtype.half_range
        shift = 0 if spec.dtype.signed else _MIDDLE
        self.low, self.high = -self.half_range, self.half_range
        if self.is_int:
            self.low, self.high = spec.dtype.qmin - shift, spec.dtype.qmax - shift
        self.largest = LARGEST / (self.half_range + 0.5)
        self.scale, self.zero, fixed = None, 0, None
        if qparams is not None:
            self.scale = qparams.scale.detach()
            self.zero = (0 if qparams.zero_point is None else int(qparams.zero_point)) - shift
            fixed = float(qparams.scale), self.zero
        self.key = (spec.dtype, self.granularity, self.group, fixed)

    @classmethod
    def of(cls, module: QuantizedWeight) -> ActivationQuantizer | None:
        """The one of `module`'s input point; None where the input is not quantized."""
        spec = module.specs.get("input")
        return None if spec is None else cls(spec, None if spec.dynamic else module.qparams("input"))

    @staticmethod
    def unsupported(
        spec: QuantSpec | None, kind: str = "int", granularities: tuple[str, ...] = ("tensor", "token")
    ) -> str | None:
        """Why activations of `spec` cannot be held as int8 (as fp8 for `float`) with such scales, or None."""
        if spec is None:
            return "the input is not quantized"
        if kind == "int" and (spec.dtype.kind != "int" or spec.dtype.bits > 8):
            return f"input {spec.dtype} is no integer of at most 8 bits"
        if kind == "float" and spec.dtype.name != "fp8_e4m3":
            return f"input {spec.dtype} is not fp8_e4m3"
        if not has_plain_scales(spec):
            return f"input {spec}: scales are not plain float32"
        if spec.granularity not in granularities:
            return f"input {spec}: one scale per {spec.granularity}, not per {' or '.join(granularities)}"
        return f"input {spec}: dynamic zero points" if spec.dynamic and not spec.symmetric else None

    def __call__(self, x: Tensor) -> QuantizedActivation:
        """`x` [..., K] as integers [M, K]."""
        global _LAST
        if (last := _LAST) is not None and last.fits(x, self.key):
            return last.result
        rows = x.reshape(-1, x.shape[-1])
        if self.granularity == "group":
            groups = self._quantize(rows.unflatten(1, (-1, self.group)))
            result = QuantizedActivation(groups.q.flatten(1), groups.scale.squeeze(2), groups.zero)
        else:
            result = self._quantize(rows)
        # tensors of inference mode do not count their changes; tracing must not see state that outlives it
        if not x.is_inference() and not torch.compiler.is_compiling():
            _LAST = _Last(weakref.ref(x, _forget), x._version, self.key, result)
        return result

    def _quantize(self, x: Tensor) -> QuantizedActivation:
        x = x if x.dtype == torch.float32 else x.float()
        if (scale := self.scale) is None:
            bound = x.abs().amax().reshape(1) if self.granularity == "tensor" else x.abs().amax(-1, keepdim=True)
            scale = bound.div_(self.half_range).clamp_(TINY, self.largest)
        steps = torch.div(x, scale)
        if not self.is_int:
            return QuantizedActivation(steps.clamp_(self.low, self.high).to(torch.float8_e4m3fn), scale, 0)
        steps.round_()
        if self.zero:
            steps.add_(self.zero)
        return QuantizedActivation(steps.clamp_(self.low, self.high).to(torch.int8), scale, self.zero)


@dataclass(frozen=True)
class _Last:
    """The integers of one tensor, as long as it lives and nobody writes to it."""

    x: weakref.ref[Tensor]
    version: int
    key: tuple[object, ...]
    result: QuantizedActivation

    def fits(self, x: Tensor, key: tuple[object, ...]) -> bool:
        return self.x() is x and not x.is_inference() and x._version == self.version and self.key == key


_LAST: _Last | None = None  # replaced as a whole and compared by identity, so that threads cannot mix entries


def _forget(dead: weakref.ref[Tensor]) -> None:
    global _LAST
    if _LAST is not None and _LAST.x is dead:
        _LAST = None
