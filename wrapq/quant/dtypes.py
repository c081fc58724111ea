"""The number formats a tensor can be quantized to, as tables: no tensor library is needed to read them.

Every format has `2 ** bits` codes. Those of an integer are the integers themselves; those of a floating-point format
are its bit patterns, sign first; those of a codebook are positions in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wrapq.errors import SpecError, nearest

Kind = Literal["int", "float", "codebook"]

NF4_VALUES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, appendix E."""


@dataclass(frozen=True)
class DType:
    """A format of `bits` bits.

    Attributes:
        name: as specs write it.
        bits: width of one code.
        signed: whether the grid has numbers below zero; every float and codebook has.
        kind: `int`, the integers from `qmin` to `qmax`; `float`, sign, exponent and mantissa; `codebook`, a list.
        mantissa: explicit mantissa bits of a float; the exponent has the rest, with bias
            `2 ** (exponent bits - 1) - 1`.
        largest: the largest finite number of a float or codebook. Their grids are symmetric.
    """

    name: str
    bits: int
    signed: bool = True
    kind: Kind = "int"
    mantissa: int = 0
    largest: float = 0.0

    @property
    def qmin(self) -> int:
        """The smallest integer of the grid; raises `SpecError` for what is no integer grid."""
        self._check_int()
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer of the grid; raises `SpecError` for what is no integer grid."""
        self._check_int()
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def least_code(self) -> int:
        """The smallest code: `qmin` of an integer, else 0."""
        return self.qmin if self.kind == "int" else 0

    @property
    def largest_code(self) -> int:
        """The largest code: `least_code + 2 ** bits - 1`."""
        return self.least_code + (1 << self.bits) - 1

    @property
    def half_range(self) -> float:
        """What a symmetric range's bound is divided by to give the scale: 7.5 for int4, 6 for fp4_e2m1, 1 for nf4."""
        return (self.qmax - self.qmin) / 2 if self.kind == "int" else self.largest

    @property
    def least_exponent(self) -> int:
        """The exponent of a float's least normal number; below it steps stay `2 ** (least_exponent - mantissa)`."""
        return 2 - (1 << (self.bits - self.mantissa - 2))

    def values(self) -> tuple[float, ...]:
        """The number that each code stands for, from `least_code` up; NaN and infinity where a float has them."""
        if self.kind == "int":
            return tuple(float(q) for q in range(self.qmin, self.qmax + 1))
        if self.kind == "codebook":
            return NF4_VALUES
        positive = [self._decoded(code) for code in range(1 << (self.bits - 1))]
        return (*positive, *(-value for value in positive))

    def _decoded(self, code: int) -> float:
        exponent, fraction = divmod(code, 1 << self.mantissa)
        if exponent == 0:
            return math.ldexp(fraction, self.least_exponent - self.mantissa)
        value = math.ldexp((1 << self.mantissa) + fraction, self.least_exponent + exponent - 1 - self.mantissa)
        if value <= self.largest:
            return value
        return math.inf if self.name == "fp8_e5m2" and fraction == 0 else math.nan

    def _check_int(self) -> None:
        if self.kind != "int":
            raise SpecError(f"{self.name} is no integer grid")

    def __str__(self) -> str:
        return self.name


_INTEGERS = [DType(f"{sign}int{bits}", bits, signed=not sign) for bits in range(2, 17) for sign in ("", "u")]
_FLOATS = [
    # OCP 8-bit Floating Point Specification 1.0: e4m3 without infinity, one NaN pattern per sign; e5m2 as IEEE 754
    DType("fp8_e4m3", 8, kind="float", mantissa=3, largest=448.0),
    DType("fp8_e5m2", 8, kind="float", mantissa=2, largest=57344.0),
    # OCP Microscaling Formats (MX) Specification 1.0, section 5.3: neither infinity nor NaN
    DType("fp6_e2m3", 6, kind="float", mantissa=3, largest=7.5),
    DType("fp6_e3m2", 6, kind="float", mantissa=2, largest=28.0),
    DType("fp4_e2m1", 4, kind="float", mantissa=1, largest=6.0),
]
DTYPES: dict[str, DType] = {
    dtype.name: dtype for dtype in (*_INTEGERS, *_FLOATS, DType("nf4", 4, kind="codebook", largest=1.0))
}

ScaleDType = Literal["float32", "bfloat16", "float16", "fp8_e4m3", "e8m0", "int8", "uint6"]
"""The formats a scale can be rounded to; e8m0 is the powers of two, one byte of exponent; integers are multiples of a
number in half precision that a super-block shares."""
SCALE_BITS: dict[ScaleDType, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8_e4m3": 8, "e8m0": 8}
SCALE_BITS |= {"int8": 8, "uint6": 6}
SUPER_BLOCK = 256
"""Neighbouring elements whose scales, where these are integers, are multiples of one number."""


def dtype_named(name: str) -> DType:
    """The dtype called `name` (`int4`, `uint8`, `fp8_e4m3`, ...); raises `SpecError` with the nearest names."""
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise SpecError(f"unknown dtype {name!r}; did you mean: {', '.join(nearest(str(name), DTYPES))}") from None
