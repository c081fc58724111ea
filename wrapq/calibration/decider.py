"""Deciding the points of a wrapped model from what was gathered for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wrapq.calibration.algorithm import RangeSetter, Rounded, Rounder
from wrapq.calibration.processes import Processes
from wrapq.calibration.recall import Recall
from wrapq.calibration.report import rounding_report
from wrapq.calibration.statistics import InputStatistics, UnusableStatisticsError
from wrapq.observers.base import Observer, observe_tensor
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer
from wrapq.wrappers.siblings import sharing_global_scale


class Decider:
    """Fixes each point of a wrapped model from its statistics: those just gathered, or those of an earlier walk.

    Args:
        model: a wrapped model whose points observe.
        rounders: the algorithm that rounds each weight point, by the point's full name.
        setters: the algorithm that chooses each static activation point's range, likewise.

    Attributes:
        recall: where statistics gathered before are looked up; None gathers all.
        processes: those that share the data.
        inputs: what was gathered of the input of each open weight, by the point's full name.
        statistics: what the observer of each static activation point gathered, by the point's full name.
        reports: for each weight its error and what its algorithm reports, by the point's full name.
        fallbacks: for each weight that was rounded to nearest because its statistics could not be used, the reason.
    """

    def __init__(self, model: nn.Module, rounders: Mapping[str, Rounder], setters: Mapping[str, RangeSetter]) -> None:
        self.model, self.rounders, self.setters = model, rounders, setters
        self.recall: Recall | None = None
        self.processes = Processes()
        self.inputs: dict[str, InputStatistics] = {}
        self.statistics: dict[str, Tensor] = {}
        self.reports: dict[str, dict[str, float]] = {}
        self.fallbacks: list[str] = []
        self.wrapped = dict(iter_wrapped(model))
        self.modules: dict[Quantizer, QuantModuleBase] = {
            quantizer: module for module in self.wrapped.values() for quantizer in module.point_quantizers().values()
        }
        # a weight that is released takes its entry with it, and none that takes its place in memory is mistaken for it
        self._tied: MutableMapping[Tensor, dict[str, Rounded]] = WeakTensorKeyDictionary()
        self._since = 0.0

    def points(self) -> Iterator[Quantizer]:
        """All points, in the model's order."""
        return iter(self.modules)

    def needs(self, weight: WeightQuantizer) -> frozenset[str]:
        """See `Walk.needs`."""
        return frozenset(self.rounders[weight.where].needs)

    def all_decided(self) -> bool:
        """Whether no point is left that data decides."""
        return all(not self.waits(q) or q.state is State.QUANTIZED for q in self.modules)

    def waits(self, quantizer: Quantizer) -> bool:
        """Whether data decides the point."""
        return bool(self.needs(quantizer)) if isinstance(quantizer, WeightQuantizer) else not quantizer.spec.dynamic

    def round_without_data(self, quantizers: Iterable[Quantizer]) -> None:
        """Round the weights among `quantizers` whose rounder needs no data."""
        for quantizer in quantizers:
            if isinstance(quantizer, WeightQuantizer) and not self.needs(quantizer):
                self.decide(quantizer)

    def decide(self, quantizer: Quantizer) -> None:
        """Fix a point from what was gathered: round a weight, or choose an activation's range."""
        if quantizer.state is State.QUANTIZED:
            return
        if isinstance(quantizer, WeightQuantizer):
            self._round(quantizer)
        else:
            observer = cast(Observer, quantizer.observer)
            self.processes.merge_observer(observer)
            quantizer.check()
            self._keep(quantizer, observer)
            for key, tensor in observer.state_dict().items():
                self.statistics[f"{quantizer.where}.{key}"] = tensor.contiguous()
            quantizer.set_qparams(self.setters[quantizer.where].choose(observer, quantizer.where))
        self._since = time.perf_counter()

    def _round(self, quantizer: WeightQuantizer) -> None:
        module, where = self.modules[quantizer], quantizer.where
        tied = self._tied.setdefault(module.float_weight(), {})  # tied weights share their integers
        if (spec := str(quantizer.spec)) not in tied:
            weight = module.float_matrix()
            statistics = self._inputs(quantizer, weight.shape[1]) if self.needs(quantizer) else None
            with sharing_global_scale(where.removesuffix(".weight"), self.wrapped):
                try:
                    rounded = self.rounders[where].round(weight, quantizer.spec, where, statistics)
                except UnusableStatisticsError as error:
                    self.fallbacks.append(str(error))
                    qparams = observe_tensor(weight, quantizer.spec, where)
                    rounded = Rounded(qparams.quantize(weight), qparams, {"fallback": 1.0})
            tied[spec] = rounded
            self.reports[where] = rounding_report(weight, rounded, statistics)
        quantizer.set_rounded(tied[spec].integers, tied[spec].qparams)

    def _inputs(self, quantizer: WeightQuantizer, columns: int) -> InputStatistics:
        """What all processes gathered for the weight; it is put together once for all weights that share it."""
        statistics = self.inputs.pop(quantizer.where, None) or InputStatistics(self.needs(quantizer))
        self.processes.reduce(statistics, columns)
        statistics.complete = True
        self._keep(quantizer, statistics)
        return statistics

    def _keep(self, quantizer: Quantizer, gathered: InputStatistics | Observer) -> None:
        if self.recall is not None and quantizer.where not in self.recall.recalled and self.processes.rank == 0:
            self.recall.keep(quantizer, gathered, time.perf_counter() - self._since)

    def load(self, points: Sequence[Quantizer]) -> bool:
        """Take the statistics of `points` from the store; False, and nothing taken, where it lacks one of them."""
        recall = cast(Recall, self.recall)
        found = recall.load(points)
        if not self.processes.least(int(found is not None)) or found is None:
            recall.recalled.clear()
            return False
        shared: dict[str, InputStatistics] = {}
        for quantizer in points:
            owner, parts = found[quantizer.where]
            if isinstance(quantizer, WeightQuantizer):
                if owner not in shared:
                    shared[owner] = InputStatistics(self.needs(quantizer))
                    shared[owner].load(parts, self.modules[quantizer].float_weight().device)
                self.inputs[quantizer.where] = shared[owner]
            else:
                device, (state,) = next(self.model.parameters()).device, parts.values()
                cast(Observer, quantizer.observer).load_state_dict({n: t.to(device) for n, t in state.items()})
        return True


def release(quantizers: Iterable[Quantizer]) -> None:
    """Forget the dequantized weights of `quantizers` until they are asked for again."""
    for quantizer in quantizers:
        if isinstance(quantizer, WeightQuantizer):
            quantizer.release()
