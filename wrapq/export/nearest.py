"""The spec that a format has in place of one that it cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from wrapq.quant.spec import QuantSpec

ELSE = "leave it float, or run with export=none"


def nearest_spec(spec: QuantSpec, weight: bool, fits: Callable[[QuantSpec], bool]) -> QuantSpec | None:
    """The spec of integers, of a weight or an activation, that is most like `spec` and `fits`; None where there is
    none."""
    return next((near for near in _like(spec, weight) if fits(near)), None)


def remedy_for(spec: QuantSpec, weight: bool, fits: Callable[[QuantSpec], bool]) -> str:
    """What to do about a `spec` that does not fit."""
    near = nearest_spec(spec, weight, fits)
    return f"quantize it in {near}, which is the nearest, {ELSE}" if near else ELSE


def _like(spec: QuantSpec, weight: bool) -> Iterator[QuantSpec]:
    shared = [f"g{spec.group_size}"] if spec.group_size else []
    shared = ["token:dyn"] if spec.dynamic else [*shared, "channel" if weight else "tensor"]
    for bits in (min(spec.dtype.bits, 8), 8, 4):
        for sharing in shared:
            for zero in ("sym", "asym") if spec.symmetric else ("asym", "sym"):
                yield QuantSpec.parse(f"int{bits}:{sharing}:{zero}")
