"""A spec as a rule writes it: a whole one as a word, or a patch as a mapping of some of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, WrapValidator, field_validator

from wrapq.errors import SpecError
from wrapq.quant.dtypes import DTYPES, ScaleDType, dtype_named
from wrapq.quant.short_form import ALIASES
from wrapq.quant.spec import FLOAT, Granularity, QuantSpec, ZeroPoint


class ObserverChoice(BaseModel):
    """An observer with its options beside its name."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1)]
    """The observer's registered name."""


class ObserverComparison(BaseModel):
    """Several observers that see the same data, of which one is taken."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    compare: Annotated[list[str], Field(min_length=1)]
    """Names of the observers."""
    choose: Annotated[str, Field(min_length=1)] = "best"
    """Which one's range is taken: that with the least expected squared error (best), for each scale, or a name."""


def _observer(value: Any, _: Any) -> Any:
    if isinstance(value, Mapping) and "compare" in value:
        return ObserverComparison.model_validate(value)
    if isinstance(value, Mapping):
        return ObserverChoice.model_validate(value)
    if value is None or (isinstance(value, str) and value):
        return value
    raise SpecError(f"{value!r} should be an observer's name, or a mapping with name and options")


class SpecFields(BaseModel):
    """The fields of a spec; those not given keep what the scheme or an earlier rule says."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    dtype: Annotated[str | None, Field(description=f"One of {', '.join(DTYPES)}.")] = None
    granularity: Granularity | None = None
    """Which elements share a scale: the whole tensor, a channel, a group of the last axis, a block, a token, a head."""
    axis: int | None = None
    """The channel axis, for granularity channel; 0 is a weight's output."""
    group_size: Annotated[int, Field(ge=1)] | None = None
    """Elements per group, for granularity group."""
    block_size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] | None = None
    """Rows and columns of a block, for granularity block."""
    symmetric: bool | None = None
    """Whether the grid is centred on zero."""
    dynamic: bool | None = None
    """Whether scales follow each tensor as it comes, instead of calibration."""
    local: bool | None = None
    """Whether group scales follow each tensor as it comes while the global scale is calibrated."""
    scale_dtype: ScaleDType | None = None
    """What scales are rounded to; e8m0 makes them powers of two, as the MX formats have them; integers are multiples of
    a number that a super-block of 256 elements shares."""
    zero_point: ZeroPoint | None = None
    """For asymmetric weights: int, which puts zero on the grid; float, not rounded, in the dtype of the scale; or min,
    which stores the least number in its place."""
    signed_scale: bool | None = None
    """Whether a symmetric integer's scales may be negative, so that the longer side of a range has one level more."""
    global_scale: bool | None = None
    """Whether group scales of fp8_e4m3 are relative to one float32 scale of the tensor, as nvfp4 has it."""
    observer: Annotated[str | ObserverChoice | ObserverComparison | None, WrapValidator(_observer)] = None
    """Which observer chooses the range of a static spec: its name, or a mapping of its name and options."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, name: str | None) -> str | None:
        if name in ALIASES:
            raise SpecError(f"{name} is no dtype but a whole spec: write it alone, or its parts, {ALIASES[name]}")
        if name is not None:
            dtype_named(name)
        return name


def _check(value: Any, handler: Any) -> str | dict[str, Any]:
    if isinstance(value, str):
        if value != FLOAT:
            QuantSpec.parse(value)
        return value
    if isinstance(value, Mapping):
        SpecFields.model_validate(value)
        return dict(value)
    raise SpecError(f"{value!r} is no spec: write a short form such as int8:channel:sym, float, or a mapping of fields")


JSON_MARK = "x-wrapq-spec"
"""Marks a spec in the JSON schema of the models; `json_schema.py` puts the full schema there."""
SpecPatch = Annotated[str | dict[str, Any], WrapValidator(_check), WithJsonSchema({JSON_MARK: True})]
"""`float`, a short form (a whole spec) or a mapping (a patch, merged key by key)."""
