"""The short form in which specs are written everywhere; all that messages and schemas say of it comes from one table.

`dtype[:part]...`, for example `int4:g128:sym`, `int8:token:dyn`, `uint8:tensor:asym:percentile(percentile=99.9)`,
`int8:channel@1`, `fp8_e4m3:b128x128`, `int8:head`. In place of the dtype it may start with one of `ALIASES`, which
stands for several parts: `mxfp4` and `mxfp4:dyn`. Parsing what was printed gives the same spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from wrapq.errors import SpecError, nearest
from wrapq.quant.dtypes import DTYPES

_ALIKE = 0.75
SIZES = {"group_size": "group", "axis": "channel", "block_size": "block"}
"""The fields that say a size or an axis, and the granularity that each is for."""
Option = str | int | float | bool
ALIASES: dict[str, str] = {
    "mxfp8": "fp8_e4m3:g32:scale=e8m0",
    "mxfp8_e5m2": "fp8_e5m2:g32:scale=e8m0",
    "mxfp6": "fp6_e2m3:g32:scale=e8m0",
    "mxfp6_e3m2": "fp6_e3m2:g32:scale=e8m0",
    "mxfp4": "fp4_e2m1:g32:scale=e8m0",
    "mxint8": "int8:g32:scale=e8m0",
    "nvfp4": "fp4_e2m1:g16:scale=fp8_e4m3:global",
    "q4_k": "uint4:g32:asym:scale=uint6:zero=min",
    "q5_k": "uint5:g32:asym:scale=uint6:zero=min",
    "q6_k": "int6:g16:sym:scale=int8:signed",
}
"""Names of whole formats, with what they stand for.

mx...: OCP Microscaling Formats (MX) Specification 1.0, table 1; of its two variants of 8 and of 6 bits the one with
more mantissa has the plain name. nvfp4: NVIDIA's, as compressed-tensors stores it. q..._k: ggml's k-quants, of
super-blocks.
"""


@dataclass(frozen=True)
class _PartKind:
    """A kind of part: how it is written, what matches it, the field of the spec that it sets, and the value."""

    written: str
    pattern: str
    field: str
    value: Callable[[re.Match[str]], Any]


_PARTS = (
    *(_PartKind(name, name, "granularity", lambda m: m[0]) for name in ("tensor", "channel", "token", "head")),
    _PartKind("channel@AXIS", r"channel@(-?[0-9]+)", "axis", lambda m: int(m[1])),
    _PartKind("gSIZE", r"g([0-9]+)", "group_size", lambda m: int(m[1])),
    _PartKind("bROWSxCOLUMNS", r"b([0-9]+)x([0-9]+)", "block_size", lambda m: [int(m[1]), int(m[2])]),
    _PartKind("sym", "sym", "symmetric", lambda m: True),
    _PartKind("asym", "asym", "symmetric", lambda m: False),
    _PartKind("scale=DTYPE", r"scale=([^:]*)", "scale_dtype", lambda m: m[1]),
    _PartKind("zero=KIND", r"zero=([^:]*)", "zero_point", lambda m: m[1]),
    _PartKind("signed", "signed", "signed_scale", lambda m: True),
    _PartKind("global", "global", "global_scale", lambda m: True),
    _PartKind("local", "local", "local", lambda m: True),
    _PartKind("dyn", "dyn", "dynamic", lambda m: True),
    _PartKind("OBSERVER", r"(?!(?:group|block)(?::|$))([a-z][a-z0-9_]*)", "observer", lambda m: {"name": m[1]}),
    _PartKind(
        "OBSERVER(OPTION=VALUE,...)",
        r"([a-z][a-z0-9_]*)\(([^()]*)\)",
        "observer",
        lambda m: {"name": m[1], **_parse_options(m[2])},
    ),
)
PARTS: tuple[str, ...] = tuple(part.written for part in _PARTS)
"""How each kind of part is written; capitals stand for what varies."""
WORDS: tuple[str, ...] = tuple(part.written for part in _PARTS if part.written == part.pattern)
"""The parts that are words of the short form itself; any other word is an observer's name."""
PATTERN = f"(?:{'|'.join((*DTYPES, *ALIASES))})(?::(?:{'|'.join(part.pattern for part in _PARTS)}))*"
"""What every short form matches, in the regular expressions that Python and JSON schemas share."""


def parse_fields(text: str) -> dict[str, Any]:
    """The short form as the mapping form, before any default is filled in."""
    head, *rest = re.split(r":(?![^()]*\))", text.strip())  # no part ends inside an observer's parentheses
    if head not in ALIASES and head not in DTYPES:
        close = nearest(head, (*ALIASES, *DTYPES))
        raise SpecError(f"unknown dtype {head!r}; did you mean: {', '.join(close)}")
    implied = parse_fields(ALIASES[head]) if head in ALIASES else {"dtype": DTYPES[head]}
    values: dict[str, Any] = {}
    for part in rest:
        key, value = _parse_part(part, text)
        shared = key == "granularity" or key in SIZES
        if shared and head in ALIASES:
            raise SpecError(f"{part!r} in {text!r}: {head} says the granularity itself, {ALIASES[head]}")
        if key in values or (shared and values.keys() & {"granularity", *SIZES}):
            raise SpecError(f"{text!r} says {'the granularity' if shared else key} twice")
        values[key] = value
    values = implied | values
    for key, granularity in SIZES.items():
        if key in values:
            values["granularity"] = granularity
    return values


def meant_word(name: str) -> str | None:
    """The word of the short form that was probably meant by `name`, which was read as an observer's."""
    return next(iter(get_close_matches(name, WORDS, n=1, cutoff=_ALIKE)), None)


def _parse_part(text: str, whole: str) -> tuple[str, Any]:
    for part in _PARTS:
        if match := re.fullmatch(part.pattern, text):
            return part.field, part.value(match)
    raise SpecError(f"{text!r} in {whole!r} is none of {', '.join(PARTS)}")


def _parse_options(text: str) -> dict[str, Option]:
    items = [item.partition("=") for item in text.split(",") if item]
    return {key.strip(): _parse_option(value.strip()) for key, _, value in items}


def _parse_option(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
