"""Deciding the points of a wrapped model from what was gathered for them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wrapq.calibration.algorithm import Algorithm, Corrector, RangeSetter, Rounded, Rounder, Rounding
from wrapq.calibration.blockwise import BLOCK, BlockRounder, BlockStop
from wrapq.calibration.by_group import correct_by_group, round_by_group, round_to_nearest
from wrapq.calibration.processes import Processes
from wrapq.calibration.recall import Recall
from wrapq.calibration.report import Reporter
from wrapq.calibration.statistics import InputStatistics, UnusableStatisticsError
from wrapq.observers.base import Observer
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.base import QuantModuleBase
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer
from wrapq.wrappers.siblings import sharing_global_scale

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")


class Decider:
    """Fixes each point of a wrapped model from its statistics: those just gathered, or those of an earlier walk.

    Args:
        model: a wrapped model whose points observe.
        rounders: the algorithm that rounds each weight point, by the point's full name.
        setters: the algorithm that chooses each static activation point's range, likewise.

    Attributes:
        correctors: those that have their turn once a weight is rounded, in order, by the point's full name.
        recall: where statistics gathered before are looked up; None gathers all.
        others: what other recipes, which gather the same and round by the same algorithm, have for weights, by the
            point's full name; these are rounded to that as well, and left in the store.
        others_seconds: how long that took.
        processes: those that share the data.
        inputs: what was gathered of the input of each open weight, by the point's full name.
        statistics: what the observer of each static activation point gathered, by the point's full name.
        reports: for each weight its error and what its algorithm reports, by the point's full name.
        fallbacks: the reason for each weight that was rounded to nearest because its statistics could not be used, and
            for each range of an expert to which no token came.
        walking: whether batches may still come to a point.
    """

    def __init__(self, model: nn.Module, rounders: Mapping[str, Rounding], setters: Mapping[str, RangeSetter]) -> None:
        self.model, self.rounders, self.setters = model, rounders, setters
        self.correctors: dict[str, list[Corrector]] = {}
        self.recall: Recall | None = None
        self.others: Mapping[str, Sequence[QuantSpec]] = {}
        self.others_seconds = 0.0
        self.processes = Processes()
        self.inputs: dict[str, InputStatistics] = {}
        self.statistics: dict[str, Tensor] = {}
        self.reports: dict[str, dict[str, float]] = {}
        self.fallbacks: list[str] = []
        self.walking = False
        self.wrapped = dict(iter_wrapped(model))
        self.modules: dict[Quantizer, QuantModuleBase] = {
            quantizer: module for module in self.wrapped.values() for quantizer in module.point_quantizers().values()
        }
        # a weight that is released takes its entry with it, and none that takes its place in memory is mistaken for it
        self._tied: MutableMapping[Tensor, dict[str, Rounded]] = WeakTensorKeyDictionary()
        self._known: dict[str, Rounded] = {}  # as an earlier job rounded them
        self._since = 0.0

    def points(self) -> Iterator[Quantizer]:
        """All points, in the model's order."""
        return iter(self.modules)

    def needs(self, weight: WeightQuantizer) -> frozenset[str]:
        """See `Walk.needs`."""
        needs = (need for algorithm in self._of_weight(weight) for need in algorithm.needs)
        return frozenset(needs) - {BLOCK}

    @property
    def blockwise(self) -> bool:
        """Whether the weights of any block are still to be decided at once."""
        return any(self.is_blockwise(q) and q.state is not State.QUANTIZED for q in self.modules)

    def is_blockwise(self, quantizer: Quantizer) -> bool:
        """Whether the point is a weight that is decided together with others of its block."""
        return isinstance(self.rounders.get(quantizer.where), BlockRounder)

    def algorithms(self) -> dict[str, list[Algorithm]]:
        """The algorithms of each static point, in order, by the point's full name."""
        setters: dict[str, list[Algorithm]] = {where: [setter] for where, setter in self.setters.items()}
        weights = (q for q in self.modules if isinstance(q, WeightQuantizer))
        return setters | {q.where: self._of_weight(q) for q in weights}

    def _of_weight(self, weight: WeightQuantizer) -> list[Algorithm]:
        return [self.rounders[weight.where], *self.correctors.get(weight.where, ())]

    def all_decided(self) -> bool:
        """Whether no point is left that data decides."""
        return all(not self.waits(q) or q.state is State.QUANTIZED for q in self.modules)

    def waits(self, quantizer: Quantizer) -> bool:
        """Whether data decides the point."""
        if not isinstance(quantizer, WeightQuantizer):
            return not quantizer.spec.dynamic
        return bool(self.needs(quantizer)) or self.is_blockwise(quantizer)

    def round_without_data(self, quantizers: Iterable[Quantizer]) -> None:
        """Round the weights among `quantizers` whose rounder needs no data."""
        for quantizer in quantizers:
            if isinstance(quantizer, WeightQuantizer) and not self.waits(quantizer):
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
            if observer.empty and self.walking and quantizer in self._experts:
                return  # batches may still come to the others, whose range it will have
            if observer.empty and (widest := self._widest_expert(quantizer)) is not None:
                self._keep(quantizer, observer)
                self.fallbacks.append(f"{quantizer.where}: no token came to it; it has the range of {widest.where}")
                quantizer.set_qparams(widest.qparams)
                return
            quantizer.check()
            self._keep(quantizer, observer)
            for key, tensor in observer.state_dict().items():
                self.statistics[f"{quantizer.where}.{key}"] = tensor.contiguous()
            quantizer.set_qparams(self.setters[quantizer.where].choose(observer, quantizer.where))
        self._since = time.perf_counter()

    @cached_property
    def _experts(self) -> Mapping[Quantizer, list[Quantizer]]:
        """For each point of an expert, the same point of all experts of its layer."""
        places: dict[tuple[str, ...], list[Quantizer]] = {}
        for quantizer in self.modules:
            if match := _EXPERT.fullmatch(quantizer.where):
                places.setdefault(match.groups(), []).append(quantizer)
        return {quantizer: alike for alike in places.values() for quantizer in alike}

    def _widest_expert(self, quantizer: Quantizer) -> Quantizer | None:
        """Of the same point of the other experts, the one with the widest range; None where there is none."""
        alike = self._experts.get(quantizer, [])
        for other in alike:  # those not decided yet: statistics of a store come in the order of the model
            if other.observer is not None and not other.observer.empty:
                self.decide(other)
        others = [q for q in alike if q.state is State.QUANTIZED and q.spec == quantizer.spec]
        width = lambda q: float(q.scale.max()) if q.scale is not None else -float(q.global_scale)  # noqa: E731
        return max(others, key=width, default=None)

    def round_blockwise(self, stop: BlockStop, quantizers: Iterable[Quantizer]) -> None:
        """Round the open weights among `quantizers`, those of a block, that are rounded together.

        They are in force at once, but for those that wait for statistics with which to correct them.
        """
        mine = {q: str(q.spec) for q in quantizers if self.is_blockwise(q) and q.state is not State.QUANTIZED}
        first = {(id(self._ties(q)), spec): q for q, spec in reversed(mine.items()) if spec not in self._ties(q)}
        for rounder in dict.fromkeys(self.rounders[q.where] for q in mine):
            own = {q.where: q for q in reversed(first.values()) if self.rounders[q.where] is rounder}
            if own:
                problem = stop.problem({where: (self.modules[q], q.spec) for where, q in own.items()})
                for where, rounded in cast(BlockRounder, rounder).round_block(problem).items():
                    self._ties(own[where])[mine[own[where]]] = rounded
        for quantizer in mine:
            if not self.needs(cast(WeightQuantizer, quantizer)):
                self.decide(quantizer)

    def _ties(self, quantizer: Quantizer) -> dict[str, Rounded]:
        """What the tensor was rounded to, by spec; tied weights share their integers."""
        return self._tied.setdefault(self.modules[quantizer].float_weight(), {})

    def _round(self, quantizer: WeightQuantizer) -> None:
        module, where = self.modules[quantizer], quantizer.where
        tied, spec = self._ties(quantizer), str(quantizer.spec)
        weight = module.float_matrix()
        correctors = self.correctors.get(where, ())
        new = where not in self.reports and (spec not in tied or self.is_blockwise(quantizer))
        known = self._known.pop(where, None)
        wanted = self.needs(quantizer) and (new or correctors) and known is None
        statistics = self._inputs(quantizer, weight.shape[1]) if wanted else None
        reporter = Reporter(weight, statistics)
        if spec not in tied:
            with sharing_global_scale(where.removesuffix(".weight"), self.wrapped):
                tied[spec] = known or self._rounded(quantizer, weight, statistics, reporter)
        rounded = tied[spec]
        if new:
            self.reports[where] = dict(known.report) if known else reporter.report(rounded)
        quantizer.set_rounded(rounded.integers, rounded.qparams)
        for corrector in correctors:
            self._correct(quantizer, weight, corrector, cast(InputStatistics, statistics))

    def _rounded(
        self, quantizer: WeightQuantizer, weight: Tensor, statistics: InputStatistics | None, reporter: Reporter
    ) -> Rounded:
        rounder, where = self.rounders[quantizer.where], quantizer.where
        try:
            if isinstance(rounder, Rounder):
                return self._rounded_for_all(rounder, weight, quantizer.spec, where, statistics, reporter)
            raise UnusableStatisticsError(f"{where}: it lies in no block, or no batch came to its block")
        except UnusableStatisticsError as error:
            self.fallbacks.append(f"{error}; it is rounded to nearest")
            return round_to_nearest(weight, quantizer.spec, where)

    def _rounded_for_all(
        self,
        rounder: Rounder,
        weight: Tensor,
        spec: QuantSpec,
        where: str,
        statistics: InputStatistics | None,
        reporter: Reporter,
    ) -> Rounded:
        """Rounded to `spec`, and on the way to what the other recipes have."""
        keeps = self.recall is not None and statistics is not None and not spec.global_scale
        others, start = self.others.get(where, ()) if keeps else (), time.perf_counter()
        rounded, *more = round_by_group(rounder, weight, [spec, *others], where, statistics, self.fallbacks)
        seconds = (time.perf_counter() - start) / (1 + len(others))
        for other, its in zip(others, more, strict=True):
            start = time.perf_counter()
            if "fallback" not in its.report:  # of which the other recipe's run has to tell
                whole = its._replace(report=reporter.report(its))
                cast(Recall, self.recall).keep_rounded(where, rounder, other, whole, seconds)
            self.others_seconds += seconds + time.perf_counter() - start
        return rounded

    def _correct(
        self, quantizer: WeightQuantizer, weight: Tensor, corrector: Corrector, statistics: InputStatistics
    ) -> None:
        error = weight.float() - quantizer.repaired_matrix()
        try:
            correction = correct_by_group(corrector, weight.float(), error, quantizer.where, statistics)
        except UnusableStatisticsError as problem:
            self.fallbacks.append(str(problem))
            return
        quantizer.correct(correction.bias, correction.a, correction.b)
        self.reports.setdefault(quantizer.where, {}).update(correction.report)

    def _inputs(self, quantizer: WeightQuantizer, columns: int) -> InputStatistics:
        """What all processes gathered for the weight; it is put together once for all weights that share it."""
        statistics = self.inputs.pop(quantizer.where, None) or InputStatistics(self.needs(quantizer))
        module = self.modules[quantizer]
        groups = module.wrapper.groups(module)
        statistics.start(columns, module.float_weight().device, groups)  # where no token came by
        self.processes.reduce(statistics, columns, groups)
        statistics.complete = True
        self._keep(quantizer, statistics)
        return statistics

    def _keep(self, quantizer: Quantizer, gathered: InputStatistics | Observer) -> None:
        if self.recall is not None and quantizer.where not in self.recall.recalled and self.processes.rank == 0:
            self.recall.keep(quantizer, gathered, time.perf_counter() - self._since)

    def load(self, points: Sequence[Quantizer]) -> bool:
        """Take the statistics of `points` from the store; False, and nothing taken, where it lacks one of them."""
        recall = cast(Recall, self.recall)
        rounded = self._load_rounded(points)
        points = [quantizer for quantizer in points if quantizer.where not in rounded]
        found = recall.load(points)
        if not self.processes.least(int(found is not None)) or found is None:
            recall.recalled.clear()
            return False
        self._known |= rounded
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

    def _load_rounded(self, points: Sequence[Quantizer]) -> dict[str, Rounded]:
        """The weights among `points` as an earlier job rounded them; none where one lacks that or needs more."""
        weights = [q for q in points if isinstance(q, WeightQuantizer)]
        if self.processes.count > 1 or any(self.is_blockwise(q) or self.correctors.get(q.where) for q in weights):
            return {}
        found = cast(Recall, self.recall).load_rounded({q.where: (self.rounders[q.where], q.spec) for q in weights})
        for quantizer in weights if found else ():
            device, its = self.modules[quantizer].float_weight().device, found[quantizer.where]
            found[quantizer.where] = its._replace(integers=its.integers.to(device), qparams=its.qparams.to(device))
        return found


def release(quantizers: Iterable[Quantizer]) -> None:
    """Forget the dequantized weights of `quantizers` until they are asked for again."""
    for quantizer in quantizers:
        if isinstance(quantizer, WeightQuantizer):
            quantizer.release()
