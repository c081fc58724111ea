"""The forwards of a walk: one batch's run through the model, and what it does where it comes to an open point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from wrapq.calibration.border import BATCH, made_for_all
from wrapq.calibration.lockstep import Stop
from wrapq.calibration.statistics import TWIN, InputStatistics
from wrapq.wrappers.quantizer import PADDING, STREAM, Quantizer, WeightQuantizer, real_tokens

Wait = Callable[[Stop], None]


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data: the keyword arguments of the forward, and the mask [B, T] of real tokens."""

    inputs: Mapping[str, Any]
    mask: Tensor | None = None


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `inputs` of a forward, with `use_cache=False` where `model` knows the word and they do not say it.

    Waiting forwards would hold keys and values that nobody reads, and a block that runs again would read its own.
    """
    known = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False, **inputs} if known else dict(inputs)


class Walk(Protocol):
    """What a forward reports to."""

    model: nn.Module
    inputs: dict[str, InputStatistics]
    """What was gathered for each open weight, by the point's full name."""

    def needs(self, weight: WeightQuantizer) -> frozenset[str]:
        """The statistics that the rounder of an open weight must be given; empty for one that needs no data."""

    def stop(self, point: Quantizer) -> Stop:
        """Where forwards wait until the point is decided."""

    def decide_at_once(self, weight: WeightQuantizer) -> bool:
        """Decide a weight of which everything is known; False where that has to wait."""


class Run:
    """One run of the model, as a stream (`wrapq.wrappers.quantizer.Stream`)."""

    quantizes: bool

    def __init__(self, model: nn.Module, batch: Batch, index: int) -> None:
        self.model, self.batch, self.index = model, batch, index

    def __call__(self) -> None:
        """Run; what the model returns is dropped."""
        copy_context().run(self._run)  # greenlets have contexts of their own

    def _run(self) -> None:
        PADDING.set(self.batch.mask)
        STREAM.set(self)
        BATCH.set(self.index)
        self.model(**self.batch.inputs)

    def observe(self, point: Quantizer, x: Tensor) -> None:
        """See `Stream.observe`."""

    def meet(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """See `Stream.meet`."""


class FloatTwin(Run):
    """The float model's run of a batch, for statistics of the difference; ahead of the run that gathers them."""

    quantizes = False

    def __init__(self, walk: Walk, batch: Batch, index: int, wait: Wait) -> None:
        super().__init__(walk.model, batch, index)
        self.walk, self.wait = walk, wait
        self._at: tuple[WeightQuantizer, Tensor] | None = None

    def rows(self, weight: WeightQuantizer, like: Tensor) -> Tensor | None:
        """The rows [M, K] that `weight`, at which this run waits, multiplies; None where they are not those of the
        tokens of `like`, because the two runs were routed to different experts."""
        if self._at is None or self._at[0] is not weight or self._at[1].shape != like.shape:
            return None
        return self._at[1]

    def meet(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """Wait where the other run will look."""
        weight = module.weight_quantizer
        if TWIN & self.walk.needs(weight):
            routed = raw.dim() == 2 and raw.shape[0] not in self._token_counts()
            self._at = None if routed else (weight, module.input_matrix(real_tokens(x.detach(), 1)))
            self.wait(self.walk.stop(weight))
            self._at = None

    def _token_counts(self) -> tuple[int, ...]:
        shape = next(value.shape for value in self.batch.inputs.values() if isinstance(value, Tensor))
        return shape[0], shape[:2].numel()


class Forward(Run):
    """A batch's run that gathers statistics.

    Args:
        walk: what it reports to.
        batch: what runs.
        index: the batch's number.
        wait: how it waits at a point it comes to; None never waits and runs through the float model.
        twin: the float model's run of the same batch, where the difference of the two is gathered.
    """

    def __init__(self, walk: Walk, batch: Batch, index: int, wait: Wait | None, twin: FloatTwin | None = None) -> None:
        super().__init__(walk.model, batch, index)
        self.walk, self.wait, self.twin = walk, wait, twin
        self.quantizes = wait is not None
        self._last: tuple[Tensor, object, InputStatistics] | None = None

    def observe(self, point: Quantizer, x: Tensor) -> None:
        """Add to what the point's observer saw, and wait until its range is chosen."""
        if point.observer is not None:
            with made_for_all():
                point.observer.update(x)
        if self.wait is not None:
            self.wait(self.walk.stop(point))

    def meet(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """Gather what the weight's rounder needs of `x`, once for all weights that one tensor feeds in one form."""
        weight = module.weight_quantizer
        if not (needs := self.walk.needs(weight)):
            return
        feeding = module.point_quantizers().get("input")
        form = str(feeding.spec) if feeding else "", module.wrapper.reads(module)
        known = self._shared(raw, form, needs)
        statistics = self.walk.inputs.setdefault(weight.where, known or InputStatistics(needs))
        if statistics is not known:
            rows = module.input_matrix(real_tokens(x.detach(), 1))
            with made_for_all():
                statistics.add(rows, self.twin.rows(weight, rows) if self.twin else None)
        self._last = raw, form, statistics
        if self.wait is None:
            return
        # all batches brought their part before that weight was decided: waiting would only hold what they made since
        complete = statistics is known and statistics.complete and self.twin is None  # a twin has to stay ahead
        if not (complete and self.walk.decide_at_once(weight)):
            self.wait(self.walk.stop(weight))

    def _shared(self, raw: Tensor, form: object, needs: frozenset[str]) -> InputStatistics | None:
        """The statistics of the weight met just before, if they are of the same tensor."""
        if self._last is None:
            return None
        before, its_form, statistics = self._last
        return statistics if before is raw and its_form == form and statistics.needs == needs else None
