"""The forwards of a walk: one batch's run through the model, and what it does where it comes to an open point."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wrapq.graph.blocks import Batch
from wrapq.observers.forward_context import in_context, outside_batch
from wrapq.statistics.input import AGAINST_FLOAT, InputStatistics
from wrapq.wrappers.quantizer import Quantizer, WeightQuantizer, real_tokens

if TYPE_CHECKING:
    from wrapq.calibration.walker import Walker


@dataclass(eq=False)
class Unobserved:
    """A forward context of which nothing is gathered; `quantizes` says whether points that are finalized quantize."""

    quantizes: bool

    def on_activation(self, point: Quantizer, x: Tensor) -> None:
        pass

    def on_weight_input(self, module: Any, raw: Tensor, x: Tensor) -> None:
        pass


class EndOfForward(Exception):  # noqa: N818 - no error
    """Raised in a forward where nobody looks at what it would give from there on."""


class BatchForward(Unobserved):
    """One batch's run through the model; see `wrapq.observers.forward_context.CalibrationHooks`.

    Its `batch` has the arguments of the `model`, and the number `index`.
    """

    def __init__(self, model: nn.Module, batch: Batch, index: int, quantizes: bool) -> None:
        super().__init__(quantizes)
        self.model, self.batch, self.index = model, batch, index
        self._last: tuple[Tensor, object, InputStatistics] | None = None

    def __call__(self) -> None:
        with suppress(EndOfForward), in_context(calibration=self, padding=self.batch.mask, batch=self.index):
            self.model(**self.batch.inputs)

    def statistics_of(
        self, x: Tensor, form: object, needs: frozenset[str], held: dict[str, InputStatistics], name: str
    ) -> tuple[InputStatistics, bool]:
        """Those that `held` has for the input `x`, under `name`, and whether `x` is in them already: they are shared
        with the input that came just before if it was the same tensor in the same form."""
        last, last_form, shared = self._last or (None, None, None)
        if last is not x or last_form != form or (shared is not None and shared.needs != needs):
            shared = None
        statistics = held.setdefault(name, shared or InputStatistics(needs))
        self._last = x, form, statistics
        return statistics, statistics is shared


class FloatReferenceForward(BatchForward):
    """The float model's run of a batch, ahead of its calibration forward, for statistics of their difference."""

    def __init__(self, walk: Walker, batch: Batch, index: int) -> None:
        super().__init__(walk.model, batch, index, quantizes=False)
        self.walk = walk
        self._waiting: tuple[WeightQuantizer, Tensor] | None = None

    def rows(self, weight: WeightQuantizer, like: Tensor) -> Tensor | None:
        """The rows [M, K] that `weight`, at which this forward waits, multiplies; None where the two runs were routed
        to different experts, so that they are not those of the tokens of `like`."""
        if self._waiting is None or self._waiting[0] is not weight or self._waiting[1].shape != like.shape:
            return None
        return self._waiting[1]

    def on_weight_input(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """Wait where the calibration forward will look."""
        weight = module.weight_quantizer
        if AGAINST_FLOAT & self.walk.assignments.needs(weight):
            shape = next(value.shape for value in self.batch.inputs.values() if isinstance(value, Tensor))
            routed = raw.dim() == 2 and raw.shape[0] not in (shape[0], shape[:2].numel())
            self._waiting = None if routed else (weight, module.input_matrix(real_tokens(x.detach(), 1)))
            self.walk.wait_at(weight)
            self._waiting = None


class CalibrationForward(BatchForward):
    """A batch's run that gathers statistics for a walk.

    Args:
        sequential: whether it waits at open points and runs through the model as it is quantized so far; else it runs
            through the float model.
        reference: the float model's run of the same batch, where the difference of the two is gathered.
    """

    def __init__(
        self, walk: Walker, batch: Batch, index: int, sequential: bool, reference: FloatReferenceForward | None = None
    ) -> None:
        super().__init__(walk.model, batch, index, quantizes=sequential)
        self.walk, self.reference = walk, reference

    def on_activation(self, point: Quantizer, x: Tensor) -> None:
        """Update the point's observer, and wait until its range is chosen."""
        self.observe(point, x)
        if self.quantizes:
            self.walk.wait_at(point)

    def observe(self, point: Quantizer, x: Tensor) -> None:
        """Update the point's observer, where it has one still."""
        if point.observer is not None:
            point.observer.batch = self.index
            with outside_batch():
                point.observer.update(x)

    def on_weight_input(self, module: Any, raw: Tensor, x: Tensor) -> None:
        """Gather what the weight's algorithms need of `x`, once for all weights that read one tensor in one form."""
        weight = module.weight_quantizer
        if not (needs := self.walk.assignments.needs(weight)):
            return
        point = module.point_quantizers().get("input")
        form = (
            str(point.spec) if point else "",
            module.wrapper.reads(module),
            weight.where if "gradient" in needs else "",
        )
        statistics, shared = self.statistics_of(raw, form, needs, self.walk.inputs, weight.where)
        if not shared:
            rows = module.input_matrix(real_tokens(x.detach(), 1))
            with outside_batch():
                reference = self.reference.rows(weight, rows) if self.reference else None
                statistics.add(rows, reference, weights=self._row_weights(weight, rows))
        if not self.quantizes:
            return
        # all batches brought their part before that weight was rounded: waiting would only hold what they made since;
        # but a float reference has to stay ahead
        complete = shared and statistics.complete and self.reference is None
        if not (complete and self.walk.finalize_at_once(weight)):
            self.walk.wait_at(weight)

    def _row_weights(self, weight: WeightQuantizer, rows: Tensor) -> Tensor | None:
        """How much each of `rows` [M, K] counts; where others were routed to it than in the float model, all alike."""
        found = self.walk.options.token_weights.get(weight.where, {}).get(self.index)
        if found is None or len(found) == len(rows):
            return found
        return found.mean().expand(len(rows))
