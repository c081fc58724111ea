"""How one tensor is quantized; `wrapq.quant.short_form` says how that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from wrapq.errors import SpecError, nearest
from wrapq.quant.dtypes import SCALE_BITS, SUPER_BLOCK, DType, ScaleDType, dtype_named
from wrapq.quant.short_form import SIZES, Option, meant_word, parse_fields

Granularity = Literal["tensor", "channel", "group", "block", "token", "head"]
ZeroPoint = Literal["int", "float", "min"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
FLOAT = "float"
"""The word that stands for "not quantized" wherever a spec may be written."""
DEFAULT_OBSERVER = "minmax"


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        dtype: the grid.
        granularity: which elements share a scale: the whole `tensor`; each index of `axis` (`channel`); `group_size`
            consecutive elements of the last axis (`group`); a tile of the last two axes (`block`); each vector along
            the last axis (`token`, only dynamic); each attention head of a tensor [..., H, T, D] (`head`).
        axis: the channel axis, for granularity `channel`; 0, a weight's output channel, unless said otherwise.
        group_size: elements per group, for granularity `group`.
        block_size: rows and columns of a tile, for granularity `block`; tiles at the edges may be smaller.
        symmetric: the grid is centred on zero, which needs no stored zero point; only integers can be asymmetric.
        dynamic: scales are computed from each tensor as it comes, not from calibration.
        local: group scales are computed from each tensor as it comes, but the global scale comes from calibration.
        scale_dtype: what scales are rounded to; `e8m0` makes them powers of two, as MX formats have them; `uint6` and
            `int8` make them such integers times a number in half precision that 256 neighbours share, a super-block, as
            ggml's k-quants have them.
        zero_point: `int`, which puts zero on the grid; or `float`, not rounded, in the dtype of the scale, as HQQ and
            tinygemm have it, which lets an asymmetric range end where the numbers do; or `min`, which stores in its
            place what the number of code 0 is below zero, in the dtype of the scale, as ggml has it.
        signed_scale: scales may be negative, so that the level that a signed grid has more below zero than above lies
            on the longer side of each range, as AutoRound's package has it.
        global_scale: group scales are relative to one more float32 scale of the tensor, so that fp8_e4m3 holds them.
        observer: which observer chooses the range of a static spec.
        observer_options: its options, as sorted pairs.

    Raises:
        SpecError: on a combination that contradicts itself; the message names the keys.
    """

    dtype: DType
    granularity: Granularity = "tensor"
    axis: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    observer: str = DEFAULT_OBSERVER
    observer_options: tuple[tuple[str, Option], ...] = ()
    block_size: tuple[int, int] | None = None
    local: bool = False
    scale_dtype: ScaleDType = "float32"
    global_scale: bool = False
    zero_point: ZeroPoint = "int"
    signed_scale: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise SpecError(f"unknown granularity {self.granularity!r}; one of: {', '.join(GRANULARITIES)}")
        for key, granularity in SIZES.items():
            if self.granularity != granularity and (size := getattr(self, key)) is not None:
                raise SpecError(f"{key}: {size} is for granularity {granularity}, not {self.granularity}; {_WHOLE}")
        if self.granularity == "channel" and self.axis is None:
            object.__setattr__(self, "axis", 0)
        if self.granularity == "group" and not _is_positive(self.group_size):
            raise SpecError(f"granularity group needs a group_size of at least 1, not {self.group_size!r}")
        if self.granularity == "block":
            object.__setattr__(self, "block_size", _tile(self.block_size))
        if self.granularity == "token" and not self.dynamic:
            raise SpecError("granularity token has no fixed scales: add dynamic: true (dyn), or use tensor or channel")
        if self.dynamic and (self.observer != DEFAULT_OBSERVER or self.observer_options):
            hint = f"; did you mean: {meant}" if (meant := meant_word(self.observer)) else ""
            what = "is for static specs; a dynamic one takes each tensor's own range"
            raise SpecError(f"observer: {self.observer} {what}{hint}")
        self._check_scales()
        self._check_zero_point()

    def _check_scales(self) -> None:
        if not self.symmetric and self.dtype.kind != "int":
            raise SpecError(f"{self.dtype} is symmetric: symmetric: false (asym) is for integers")
        if self.scale_dtype not in SCALE_BITS:
            raise SpecError(f"unknown scale_dtype {self.scale_dtype!r}; one of: {', '.join(SCALE_BITS)}")
        if self.scale_dtype == "e8m0" and not self.symmetric:
            raise SpecError("scale_dtype e8m0 is for symmetric specs: MX formats have no zero point")
        integers = self.dtype.kind == "int" and self.dtype.signed and self.symmetric
        if self.signed_scale and (not integers or self.dynamic or self.scale_dtype not in (*_FLOAT_DTYPES, "int8")):
            what = "static, symmetric, signed integers with scales of a float dtype or int8"
            raise SpecError(f"signed_scale (signed) is for {what}")
        if self.super_blocks:
            self._check_super_blocks()
        if self.global_scale and (self.granularity != "group" or self.scale_dtype != "fp8_e4m3" or not self.symmetric):
            raise SpecError("global_scale is for symmetric groups with scale_dtype fp8_e4m3, as nvfp4 has them")
        if self.local and (self.dynamic or not self.global_scale):
            what = "keeps a global scale and makes the group scales dynamic"
            raise SpecError(f"local {what}: it needs global_scale: true")

    def _check_super_blocks(self) -> None:
        if self.dynamic or self.granularity != "group" or SUPER_BLOCK % (self.group_size or 1):
            what = f"is for static groups of a size that divides {SUPER_BLOCK}, whose scales share another"
            raise SpecError(f"scale_dtype {self.scale_dtype} {what}")
        if self.dtype.kind != "int" or (self.symmetric and not self.dtype.signed):
            raise SpecError(f"scale_dtype {self.scale_dtype} is for signed integers, or asymmetric ones")
        if not self.symmetric and self.zero_point != "min":
            raise SpecError(f"scale_dtype {self.scale_dtype} has minima in place of zero points: add zero=min")

    def _check_zero_point(self) -> None:
        if self.zero_point not in (kinds := get_args(ZeroPoint)):
            raise SpecError(f"unknown kind of zero point {self.zero_point!r}; one of: {', '.join(kinds)}")
        if self.zero_point == "int":
            return
        kind = self.zero_point
        if self.symmetric:
            raise SpecError(f"zero_point {kind} (zero={kind}) is for asymmetric integers: add symmetric: false (asym)")
        if self.dynamic:
            raise SpecError(f"zero_point {kind} (zero={kind}) is for static specs of weights, not dynamic ones")
        if kind == "min" and self.dtype.signed:
            raise SpecError(f"zero_point min (zero=min) is for unsigned integers, not {self.dtype}")
        if self.scale_dtype not in _FLOAT_DTYPES and not (kind == "min" and self.super_blocks):
            known = ", ".join(_FLOAT_DTYPES)
            raise SpecError(f"a {kind} zero point is stored as the scale is, in {known}, not {self.scale_dtype}")

    @property
    def super_blocks(self) -> bool:
        """Whether scales are integers times a number that a super-block shares."""
        return self.scale_dtype in ("int8", "uint6")

    def with_free_scales(self) -> QuantSpec:
        """This spec, but for scales of super-blocks, which depend on each other: those are float32."""
        return replace(self, scale_dtype="float32") if self.super_blocks else self

    @property
    def groups_at_once(self) -> int:
        """The groups of a super-block."""
        return SUPER_BLOCK // (self.group_size or 1)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The spec that the short form `text` says; raises `SpecError` naming the part that is wrong."""
        return cls.from_fields(parse_fields(text))

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> QuantSpec:
        """The spec that the mapping form says; `dtype` is required, `symmetric` follows its sign unless given."""
        if unknown := [key for key in values if key not in FIELDS]:
            raise SpecError(f"unknown key {unknown[0]!r}; did you mean: {', '.join(nearest(unknown[0], FIELDS))}")
        if values.get("dtype") is None:
            raise SpecError(f"no dtype in {dict(values)}")
        given = {key: value for key, value in values.items() if value is not None}
        dtype = given["dtype"] if isinstance(given["dtype"], DType) else dtype_named(given["dtype"])
        observer, options = _observer(given.get("observer"))
        made = {"dtype": dtype, "observer": observer, "observer_options": options}
        return cls(**{"symmetric": dtype.signed, **given, **made})

    def fields(self) -> dict[str, Any]:
        """The mapping form: what `from_fields` takes, only the keys that mean something for this spec."""
        out: dict[str, Any] = {"dtype": self.dtype.name, "granularity": self.granularity}
        sizes = {key: size for key in SIZES if (size := getattr(self, key)) is not None}
        out |= {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}
        out |= {"symmetric": self.symmetric, "dynamic": self.dynamic}
        if self.scale_dtype != "float32":
            out["scale_dtype"] = self.scale_dtype
        if self.zero_point != "int":
            out["zero_point"] = self.zero_point
        out |= {key: True for key in ("signed_scale", "global_scale", "local") if getattr(self, key)}
        if not self.dynamic:
            out["observer"] = {"name": self.observer, **dict(self.observer_options)}
        return out

    def __str__(self) -> str:
        sized = {
            "group": f"g{self.group_size}",
            "block": f"b{'x'.join(map(str, self.block_size or ()))}",
            "channel": "channel" if self.axis == 0 else f"channel@{self.axis}",
        }
        parts = [self.dtype.name, sized.get(self.granularity, self.granularity), "sym" if self.symmetric else "asym"]
        if self.scale_dtype != "float32":
            parts.append(f"scale={self.scale_dtype}")
        if self.zero_point != "int":
            parts.append(f"zero={self.zero_point}")
        words = {"signed": self.signed_scale, "global": self.global_scale, "local": self.local, "dyn": self.dynamic}
        parts += [word for word, holds in words.items() if holds]
        options = ",".join(f"{key}={_print_option(value)}" for key, value in self.observer_options)
        if self.observer != DEFAULT_OBSERVER or options:
            parts.append(f"{self.observer}({options})" if options else self.observer)
        return ":".join(parts)


FIELDS: tuple[str, ...] = tuple(f.name for f in fields(QuantSpec) if f.name != "observer_options")
_FLOAT_DTYPES = ("float32", "bfloat16", "float16")
_WHOLE = "to change a scheme's granularity replace the whole spec, e.g. int8:channel:sym"


def _observer(value: Any) -> tuple[str, tuple[tuple[str, Option], ...]]:
    if value is None:
        return DEFAULT_OBSERVER, ()
    if isinstance(value, str):
        return value, ()
    if isinstance(value, Mapping) and "compare" in value:
        return _comparison(value)
    if not isinstance(value, Mapping) or "name" not in value:
        raise SpecError(f"observer must be a name or a mapping with a name, not {value!r}")
    return value["name"], tuple(sorted((k, v) for k, v in value.items() if k != "name"))


def _comparison(value: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Option], ...]]:
    """`{compare: [minmax, mse], choose: best}` as the observer `compare` with the names joined by +."""
    names = value["compare"]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"compare is a list of observers' names, not {names!r}")
    rest = {key: option for key, option in value.items() if key != "compare"}
    return "compare", tuple(sorted({"of": "+".join(names), **rest}.items()))


def _print_option(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def _tile(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_positive, value)):
        raise SpecError(f"granularity block needs a block_size of rows and columns, such as [128, 128], not {value!r}")
    return value[0], value[1]


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
