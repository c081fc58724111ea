"""What cannot work for a module, found from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from wrapq.errors import Problem, SpecError, UnknownNameError
from wrapq.observers.base import make_observer
from wrapq.quant.affine import scale_shape
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.rules import Draft
from wrapq.resolve.selectors import Site
from wrapq.wrappers.base import Point

_ACTIVATION_RANK = 3  # [B, T, K]
_FOR_WEIGHTS = "tensor, channel, group or block"
_HEADS = -3  # of [B, H, T, D]


def build_spec(site: Site, point: Point, draft: Draft) -> QuantSpec:
    """The spec that the draft of `point` says; raises `SpecError` when it contradicts itself or does not fit."""
    try:
        spec = QuantSpec.from_fields(draft.fields)
        if not spec.dynamic:
            make_observer(spec)
    except UnknownNameError as error:
        raise SpecError(str(error)) from None
    if point.role == "weight":
        _check_weight(site, spec)
    else:
        _check_activation(site, point, spec)
    return spec


def weight_shape(site: Site) -> tuple[int, int] | None:
    """The shape of the site's weight as a matrix [N, K], or None where it has no weight."""
    weight = site.module._parameters.get("weight")
    if site.wrapper is None or weight is None:
        return None
    rows, columns = site.wrapper.to_matrix(weight).shape
    return int(rows), int(columns)


def tied_problems(model: nn.Module, specs: Mapping[str, Mapping[str, QuantSpec]]) -> Iterator[Problem]:
    """Weights that several modules share must get one spec, or none: quantizing one of them would untie them."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    for names in owners.values():
        said = {name: str(specs.get(name, {}).get("weight", "float")) for name in names}
        if len(set(said.values())) > 1:
            listed = ", ".join(f"{name}.weight is {spec}" for name, spec in said.items())
            what = f"these are one tied tensor, but {listed}"
            yield Problem("rules", what, (), "give them the same weight spec, or leave them all float")


def _check_weight(site: Site, spec: QuantSpec) -> None:
    if spec.dynamic or spec.local:
        word = "dynamic" if spec.dynamic else "local"
        raise SpecError(
            f"{spec}: a weight does not change, so it cannot be {word}: use tensor, channel, group or block"
        )
    if spec.granularity == "head":
        raise SpecError(f"{spec}: a weight has no heads: use {_FOR_WEIGHTS}")
    shape = weight_shape(site)
    if shape is None:
        raise SpecError(f"{spec}: {type(site.module).__name__} has no weight")
    _check_groups(spec, shape)


def _check_activation(site: Site, point: Point, spec: QuantSpec) -> None:
    if spec.zero_point == "float":
        raise SpecError(f"{spec}: float zero points are for weights; {point.name} needs zero_point: int")
    fixed = site.wrapper.fixed_axes(site.module, point) if site.wrapper is not None else point.fixed_axes
    if spec.granularity == "block" and not spec.dynamic:
        raise SpecError(
            f"{spec}: fixed blocks have rows, and so no meaning for tensors of varying length: use groups, or add dyn"
        )
    if spec.granularity == "head" and (point.fixed_axes is None or _HEADS not in point.fixed_axes):
        having = [p.name for p in site.points if p.fixed_axes is not None and _HEADS in p.fixed_axes]
        has = f"of {type(site.module).__name__} only {', '.join(having)} have" if having else "it has none"
        raise SpecError(f"{spec}: one scale for each attention head, and {has}: use tensor, or token with dyn")
    if spec.granularity == "channel":
        _check_channels(point, spec, fixed)
    if spec.granularity == "group":
        if fixed is not None and -1 not in fixed:
            raise SpecError(f"{spec}: the last axis of {point.name} is as long as the data, so it has no groups")
        if site.wrapper is not None and (width := site.wrapper.width(site.module, point.name)) is not None:
            _check_groups(spec, (1,) * (_ACTIVATION_RANK - 1) + (width,))


def _check_channels(point: Point, spec: QuantSpec, fixed: tuple[int, ...] | None) -> None:
    axis = spec.axis or 0
    if axis >= 0 and (fixed is None or -1 in fixed):
        raise SpecError(f"{spec}: an activation's channels are its last axis: write channel@-1 (axis: -1)")
    if fixed is not None and axis not in fixed and (axis >= 0 or not spec.dynamic):
        known = ", ".join(f"channel@{known}" for known in fixed)
        raise SpecError(f"{spec}: that axis of {point.name} is as long as the data: use {known}, or tensor")


def _check_groups(spec: QuantSpec, shape: Sequence[int]) -> None:
    try:
        scale_shape(shape, spec)
    except SpecError as error:
        width = shape[-1]
        near = sorted((d for d in range(8, width + 1) if width % d == 0), key=lambda d: abs(d - (spec.group_size or 0)))
        hint = (
            f"; {width} is divided by {', '.join(map(str, near[:4]))}" if spec.granularity == "group" and near else ""
        )
        raise SpecError(f"{error}{hint}") from None
