"""What an observer is: a stream of tensors reduced to a range, and so to the parameters of a static spec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from wrapq.errors import CalibrationError, ProblemsError, SpecError, UnknownNameError
from wrapq.observers.forward_context import forward_context
from wrapq.quant.affine import (
    global_scale_for,
    range_over,
    range_to_qparams,
    reduce_range,
    scale_shape,
    split_groups,
    split_tiles,
)
from wrapq.quant.qparams import QParams
from wrapq.quant.short_form import meant_word
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Configurable, Place, Registry, build


class InputConsumer(Protocol):
    """What multiplies the tensor that an observer sees: as the wrapper of a linear or a convolution does."""

    def matrix(self, x: Tensor) -> Tensor:
        """`x` [..., K], of real tokens, as the rows [M, K] that are multiplied, or [G, M, K] of G groups."""

    def weight(self) -> Tensor:
        """The float weight [N, K], or [G, N, K]."""


class Observer(Configurable, ABC):
    """A running statistic of one quantization point.

    A subclass keeps what it gathers in the tensors named by `STATE`, which are None until the first update:

        @OBSERVERS.register("minmax")
        class MinMax(Observer):
            STATE = ("low", "high")
            def update(self, x): ...
            def merge(self, other): ...
            def range(self): ...

    Ranges are shaped like the scale (`wrapq.quant.affine`), except that a stream whose spec has groups shares them
    among all positions, [K / g], since batches differ in their number of positions.

    Args:
        spec: a static spec.
        options: of the class `Options`. The description of an option says which values it may have, as errors do.

    Attributes:
        consumer: what multiplies the tensor; None where no weight does.
        batch: the number of the batch that the next tensor belongs to, by which a sample of its rows is chosen.

    Raises:
        SpecError: the spec is dynamic, which leaves nothing to observe.
    """

    STATE: tuple[str, ...] = ()
    in_parts: bool = False
    """Whether a tensor may come in parts, one after the other: what is gathered is then the same."""
    needs_consumer: bool = False
    """Whether it chooses by what multiplies the tensor."""

    def __init__(self, spec: QuantSpec, options: Any = None) -> None:
        super().__init__(options)
        if spec.dynamic:
            raise SpecError(f"{spec}: a dynamic spec takes its scales from each tensor and has no observer")
        self.target = spec
        self.consumer: InputConsumer | None = None
        self.batch = 0
        # of a local spec only the global scale is fixed, which needs the range of the tensor as a whole
        self.spec = QuantSpec(spec.dtype, observer=spec.observer) if spec.local else spec
        for name in self.STATE:
            setattr(self, name, None)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in `x` [..., K], of any float dtype, padding removed. An empty tensor changes nothing."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what `other`, of the same spec, has seen."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """The range chosen, (low, high), float32; NaN or inf where the data held such. Not to be called when empty."""

    def tensor_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range chosen for a whole tensor at hand, such as a weight, without approximation. Keeps nothing."""
        return reduce_range(x, self.spec)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest element seen, where the range may be a part of that; else the range."""
        return self.range()

    @property
    def empty(self) -> bool:
        """Whether no element has been seen."""
        return getattr(self, self.STATE[0]) is None

    def qparams(self, where: str) -> QParams:
        """The parameters for the range chosen; raises `CalibrationError`, beginning with `where`, when nothing was
        seen, or NaN or inf was."""
        if self.empty:
            raise CalibrationError(f"{where}: saw no data, so no {self.spec} range can be chosen")
        chosen = self.range()
        whole = chosen if self.target.local else self.bounds()  # a local spec's range is the global scale's own
        return checked_qparams(*chosen, self.target, where, global_scale_for(*whole, self.target))

    def report(self) -> dict[str, dict[str, float]]:
        """What there is to say about the choice beside the range itself, by name; nothing unless overridden."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered, by name; empty when nothing was seen."""
        return {} if self.empty else {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what was gathered by `state`; raises `CalibrationError` when it is another observer's."""
        if state and set(state) != set(self.STATE):
            raise CalibrationError(f"{self.spec}: state with {sorted(state)}, expected {sorted(self.STATE)}")
        for name in self.STATE:
            setattr(self, name, state[name].clone() if state else None)


OBSERVERS: Registry[type[Observer]] = Registry("observer", "wrapq.observers")


def make_observer(spec: QuantSpec) -> Observer:
    """The observer that `spec` names; raises `UnknownNameError` where there is none, with the nearest word of the short
    form, and `SpecError` for a wrong option."""
    if spec.observer not in OBSERVERS and (meant := meant_word(spec.observer)):
        raise UnknownNameError("part of a spec", spec.observer, [meant])
    fields, options = OBSERVERS.get(spec.observer).Options.model_fields, dict(spec.observer_options)
    try:
        return build(OBSERVERS, spec.observer, options, Place("", "observer", owner="observer {}"), spec)
    except ProblemsError as error:
        problem = error.problems[0]
        if problem.path in fields:
            meaning, value = fields[problem.path].description, options[problem.path]
            raise SpecError(f"{spec}: {problem.path} is {meaning}, not {value!r}") from None
        hint = f"did you mean: {', '.join(problem.nearest)}" if problem.nearest else "it has none"
        raise SpecError(f"{spec}: {problem.what}; {hint}") from None


def observe_tensor(x: Tensor, spec: QuantSpec, where: str) -> QParams:
    """The parameters of one static tensor at hand (a weight), chosen by the spec's observer from all its elements;
    raises `CalibrationError`, beginning with `where`, where it is empty or holds NaN or inf, and `SpecError` where the
    spec does not fit it or has wrong options."""
    if spec.local:
        raise SpecError(f"{where}: {spec} is for activations, since a weight does not change")
    observer = make_observer(spec)
    x = x.detach()
    if not x.numel():
        raise CalibrationError(f"{where}: an empty tensor of shape {tuple(x.shape)} has no {spec} range")
    global_scale = weight_global_scale(*reduce_range(x, spec), spec) if spec.global_scale else None
    return checked_qparams(*observer.tensor_range(x), spec, where, global_scale)


def weight_global_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor | None:
    """The global scale of a weight whose elements are `low` to `high`, or of all that share it."""
    bound = forward_context().shared_bound
    return global_scale_for(low, high, spec) if bound is None else global_scale_for(-bound, bound, spec)


def checked_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, where: str, global_scale: Tensor | None = None
) -> QParams:
    """The parameters for the ranges `low` to `high`, relative to `global_scale` where the spec has one; raises
    `CalibrationError`, beginning with `where`, for a range that is not finite."""
    finite = torch.isfinite(low) & torch.isfinite(high)
    if not bool(finite.all()):
        kind = "NaN" if bool((torch.isnan(low) | torch.isnan(high)).any()) else "inf"
        bad, count = int((~finite).sum()), finite.numel()
        raise CalibrationError(f"{where}: the data holds {kind} ({bad} of {count} {spec} ranges are not finite)")
    if global_scale is None:
        global_scale = weight_global_scale(low, high, spec)
    if spec.local:
        return QParams(spec, torch.empty(0, device=low.device), global_scale=global_scale)
    return QParams(spec, *range_to_qparams(low, high, spec, global_scale), global_scale=global_scale)


def stream_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """As `reduce_range`, but groups are shared among positions: [K / g] for `x` [..., K]; raises `SpecError` for
    blocks, which have rows and so no meaning for tensors of varying length."""
    if spec.granularity == "block":
        raise SpecError(f"{spec}: fixed blocks are for weights; give activations groups, or make them dynamic")
    if spec.granularity != "group":
        return reduce_range(x, spec)
    parts = split_groups(x, spec)  # [..., G, g]
    low, high = range_over(parts, [i for i in range(parts.dim()) if i != parts.dim() - 2])
    return low.flatten(), high.flatten()


def scale_rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` as a matrix [R, M] whose row r holds the elements under the r-th scale, in the order of `scale_shape`; blocks
    that are smaller, at an edge, hold their last elements several times."""
    rows = math.prod(scale_shape(x.shape, spec))
    if spec.granularity == "block":
        x = split_tiles(x, spec).transpose(-3, -2)
    if spec.granularity == "head":
        x = x.movedim(-3, 0)
    if spec.granularity == "channel":
        x = x.movedim(spec.axis or 0, 0)
    return x.reshape(rows, -1)


def all_finite(low: Tensor, high: Tensor) -> bool:
    """Whether neither bound of any range is NaN or inf."""
    return bool((torch.isfinite(low) & torch.isfinite(high)).all())


def joined(a: Tensor, b: Tensor, spec: QuantSpec) -> Tensor:
    """`b` on the device of `a`; raises `CalibrationError` when the two streams differ in their number of channels."""
    if a.numel() != b.numel():
        raise CalibrationError(f"{spec}: data with {b.numel()} ranges after data with {a.numel()}")
    return b.to(a.device)


def keep_rows(rows: Tensor, count: int) -> Tensor:
    """The `count` rows of [..., M, K + 1] that have the largest numbers in the last column."""
    numbers = rows[..., -1].reshape(-1, rows.shape[-2])[0]
    return rows.index_select(-2, numbers.topk(min(count, len(numbers))).indices)


def numbered(x: Tensor, batch: int) -> Tensor:
    """`x` [..., M, K] with a number between 0 and 1 in one more column, which batch and row decide, and nothing else:
    so the largest choose at random, and the same rows whatever the order of batches and the process they are in."""
    row = torch.arange(1, x.shape[-2] + 1, device=x.device)
    mixed = row * 2654435761 % 2**32 ^ batch * 2246822519 % 2**32
    mixed = (mixed ^ mixed >> 15) * 739982445 % 2**32
    numbers = ((mixed ^ mixed >> 12) % 2**24 + 1) / (2**24 + 1)
    return torch.cat([x, numbers.to(x)[:, None].expand(*x.shape[:-1], 1)], -1)
