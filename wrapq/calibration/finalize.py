"""Finalizing the points of a wrapped model from the statistics gathered for them: weights rounded, ranges chosen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wrapq.algorithms.base import BlockRounder, Corrector, Rounded, Rounder
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.block_reconstruction import ReconstructionBarrier
from wrapq.calibration.grouped_conv import correct_by_group, round_by_group, round_to_nearest
from wrapq.calibration.processes import Processes
from wrapq.calibration.weight_error import error_report
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.observers.base import Observer
from wrapq.statistics.cache import StatisticsCache
from wrapq.statistics.input import InputStatistics, UnusableStatisticsError
from wrapq.wrappers.base import ModuleConsumer, QuantModuleBase
from wrapq.wrappers.fused_layers import sharing_global_scale, siblings
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer


@dataclass(frozen=True)
class WalkResult:
    """The record of a walk, beside the finalized model.

    Attributes:
        reports: for each weight its error and what its algorithms report, by the point's full name.
        fallbacks: which weights were rounded to nearest, and why, and which experts no token came to.
        statistics: what the observer of each static activation gathered, by the point's full name and the part.
    """

    reports: dict[str, dict[str, float]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Finalizer:
    """Finalizes each point of a wrapped model from its statistics: those just gathered, or those of an earlier walk.

    Attributes:
        model: a wrapped model whose points observe.
        cache: where statistics of earlier walks are looked up; None gathers all.
        result: what is left beside the finalized model.
        inputs: what was gathered of the input of each open weight, by the point's full name.
        gathering: whether batches may still come to a point.
        modules: the module of each point, in the model's order.
    """

    def __init__(
        self, model: nn.Module, assignments: Assignments, processes: Processes, cache: StatisticsCache | None = None
    ) -> None:
        self.model, self.assignments, self.processes, self.cache = model, assignments, processes, cache
        self.result = WalkResult()
        self.inputs: dict[str, InputStatistics] = {}
        self.gathering = False
        self.wrapped = dict(iter_wrapped(model))
        self.modules: dict[Quantizer, QuantModuleBase] = {
            point: module for module in self.wrapped.values() for point in module.point_quantizers().values()
        }
        # a weight that is released takes its entry with it, and none that takes its place in memory is mistaken for it
        self._tied: MutableMapping[Tensor, dict[str, Rounded]] = WeakTensorKeyDictionary()
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Batches run from here on: the time until a point is finalized is what gathering its statistics took."""
        self._since = time.perf_counter()

    def start_anew(self) -> None:
        """Forget all that was gathered and finalized."""
        for table in (self.inputs, self.result.statistics, self.result.reports, self.result.fallbacks, self._tied):
            table.clear()
        for point in self.modules:
            point.observe()
            if point.spec.dynamic:
                point.freeze()

    def forget_ties(self) -> None:
        """Let go of what tied weights share, once all are rounded."""
        self._tied.clear()

    def all_finalized(self) -> bool:
        """Whether no point is left that is finalized from data."""
        return all(not self.assignments.needs_data(p) or p.state is State.QUANTIZED for p in self.modules)

    def round_without_data(self, points: Iterable[Quantizer]) -> None:
        """Round the weights among `points` whose algorithms need no data."""
        for point in points:
            if isinstance(point, WeightQuantizer) and not self.assignments.needs_data(point):
                self.finalize(point)

    def finalize(self, point: Quantizer) -> None:
        """Round a weight, or choose an activation's range; nothing where that is done already."""
        if point.state is State.QUANTIZED:
            return
        if isinstance(point, WeightQuantizer):
            self._round(point)
        else:
            self._set_range(point)
        self._since = time.perf_counter()

    def _set_range(self, point: Quantizer) -> None:
        observer = cast(Observer, point.observer)
        self.processes.merge_observer(observer)
        if observer.empty and self.gathering and point in self._experts:
            return  # batches may still come to the others, whose range it will have
        if observer.empty and (widest := self._widest_expert(point)) is not None:
            self._keep(point, observer)
            self.result.fallbacks.append(f"{point.where}: no token came to it; it has the range of {widest.where}")
            point.set_qparams(widest.qparams)
            return
        point.check()
        self._keep(point, observer)
        for key, tensor in observer.state_dict().items():
            self.result.statistics[f"{point.where}.{key}"] = tensor.contiguous()
        if observer.consumer is not None:
            observer.consumer = ModuleConsumer(self._reading_with(point))
        point.set_qparams(self.assignments.range_setters[point.where].choose(observer, point.where))

    def _reading_with(self, point: Quantizer) -> tuple[QuantModuleBase, ...]:
        """The modules that inference engines run as one with that of a point, and that quantize the same input alike:
        such an engine has one range for them."""
        name, _, kind = point.where.rpartition(".")
        found = (self.wrapped.get(sibling) for sibling in siblings(name))
        those = [each for each in found if each is not None and kind in each.quantizers]
        return tuple(each for each in those if each.point_quantizers()[kind].spec == point.spec)

    @cached_property
    def _experts(self) -> Mapping[Quantizer, list[Quantizer]]:
        """For each point of an expert, the same point of all experts of its layer."""
        layers: dict[tuple[str, ...], list[Quantizer]] = {}
        for point in self.modules:
            if match := EXPERT_NAME.fullmatch(point.where):
                layers.setdefault(match.groups(), []).append(point)
        return {point: experts for experts in layers.values() for point in experts}

    def _widest_expert(self, point: Quantizer) -> Quantizer | None:
        """Of the same point of the other experts, the one with the widest range; None where there is none."""
        experts = self._experts.get(point, [])
        for other in experts:  # those not finalized yet: statistics of a cache come in the order of the model
            if other.observer is not None and not other.observer.empty:
                self.finalize(other)
        others = [q for q in experts if q.state is State.QUANTIZED and q.spec == point.spec]
        width = lambda q: float(q.scale.max()) if q.scale is not None else -float(q.global_scale)  # noqa: E731
        return max(others, key=width, default=None)

    def open_by_block(self, points: Iterable[Quantizer]) -> list[WeightQuantizer]:
        """Those of `points` that are weights still to be rounded together with others of their block."""
        weights = (point for point in points if isinstance(point, WeightQuantizer) and self.assignments.by_block(point))
        return [point for point in weights if point.state is not State.QUANTIZED]

    def round_block(self, barrier: ReconstructionBarrier, points: Iterable[Quantizer]) -> None:
        """Round the open weights among `points`, those of a block, that are rounded together; they are in force at
        once, but for those that wait for statistics with which to correct them."""
        weights = self.open_by_block(points)
        new: dict[tuple[int, str], WeightQuantizer] = {}  # of tied weights with one spec only the first is rounded
        for point in weights:
            if (spec := str(point.spec)) not in (ties := self._ties(point)):
                new.setdefault((id(ties), spec), point)
        rounders = {point: cast(BlockRounder, self.assignments.rounders[point.where]) for point in new.values()}
        for rounder in dict.fromkeys(rounders.values()):
            own = {point.where: point for point, assigned in rounders.items() if assigned is rounder}
            problem = barrier.problem({where: self.modules[point] for where, point in own.items()})
            for where, rounded in rounder.round_block(problem).items():
                self._ties(own[where])[str(own[where].spec)] = rounded
        for point in weights:
            if not self.assignments.needs(point):
                self.finalize(point)

    def _ties(self, point: Quantizer) -> dict[str, Rounded]:
        """What the weight's tensor was rounded to, by spec; tied weights share their integers."""
        return self._tied.setdefault(self.modules[point].float_weight(), {})

    def _round(self, point: WeightQuantizer) -> None:
        module, where = self.modules[point], point.where
        tied, spec = self._ties(point), str(point.spec)
        weight = module.float_matrix()
        correctors = self.assignments.correctors.get(where, ())
        new = where not in self.result.reports and (spec not in tied or self.assignments.by_block(point))
        wanted = self.assignments.needs(point) and (new or correctors)
        statistics = self._complete(point, weight.shape[1]) if wanted else None
        if spec not in tied:
            with sharing_global_scale(where.removesuffix(".weight"), self.wrapped):
                tied[spec] = self._rounded(point, weight, statistics)
        rounded = tied[spec]
        if new:
            self.result.reports[where] = error_report(weight, rounded, statistics) | dict(rounded.report)
        point.set_rounded(rounded.integers, rounded.qparams)
        for corrector in correctors:
            self._correct(point, weight, corrector, cast(InputStatistics, statistics))

    def _rounded(self, point: WeightQuantizer, weight: Tensor, statistics: InputStatistics | None) -> Rounded:
        rounder, where = self.assignments.rounders[point.where], point.where
        if isinstance(rounder, Rounder):
            return round_by_group(rounder, weight, point.spec, where, statistics, self.result.fallbacks)
        reason = f"{where}: it lies in no block, or no batch came to its block"
        self.result.fallbacks.append(f"{reason}; it is rounded to nearest")
        return round_to_nearest(weight, point.spec, where)

    def _correct(
        self, point: WeightQuantizer, weight: Tensor, corrector: Corrector, statistics: InputStatistics
    ) -> None:
        error = weight.float() - point.repaired_matrix()
        try:
            correction = correct_by_group(corrector, weight.float(), error, point.where, statistics)
        except UnusableStatisticsError as problem:
            self.result.fallbacks.append(str(problem))
            return
        point.correct(correction.bias, correction.a, correction.b)
        self.result.reports.setdefault(point.where, {}).update(correction.report)

    def _complete(self, point: WeightQuantizer, columns: int) -> InputStatistics:
        """What all processes gathered for the weight; it is summed once for all weights that share it."""
        statistics = self.inputs.pop(point.where, None) or InputStatistics(self.assignments.needs(point))
        module = self.modules[point]
        groups = module.wrapper.groups(module)
        statistics.start(columns, module.float_weight().device, groups)  # where no token came by
        self.processes.reduce(statistics, columns, groups)
        statistics.complete = True
        self._keep(point, statistics)
        return statistics

    def _keep(self, point: Quantizer, gathered: InputStatistics | Observer) -> None:
        if self.cache is None or self.processes.rank:
            return
        if point.where not in self.cache.read:
            parts = {"observer": gathered.state_dict()} if isinstance(gathered, Observer) else gathered.parts()
            self.cache.put(point.where, gathered, parts, time.perf_counter() - self._since)
        if isinstance(gathered, InputStatistics) and "hessian" in gathered.needs:
            gathered.factorize = partial(self.cache.factorize, self.cache.owner(point.where, gathered))

    def load(self, points: Sequence[Quantizer]) -> bool:
        """Take the statistics of `points` from the cache; False, and nothing taken, where it lacks one of them."""
        cache = cast(StatisticsCache, self.cache)
        stored = cache.get([point.where for point in points])
        if not self.processes.least(int(stored is not None)) or stored is None:
            cache.read.clear()
            return False
        shared: dict[str, InputStatistics] = {}
        for point in points:
            owner, parts = stored[point.where]
            if isinstance(point, WeightQuantizer):
                if owner not in shared:
                    shared[owner] = InputStatistics(self.assignments.needs(point))
                    shared[owner].load(parts, self.modules[point].float_weight().device)
                self.inputs[point.where] = shared[owner]
            else:
                device, (state,) = next(self.model.parameters()).device, parts.values()
                cast(Observer, point.observer).load_state_dict({n: t.to(device) for n, t in state.items()})
        return True


def release(points: Iterable[Quantizer]) -> None:
    """Forget the dequantized weights among `points` until they are asked for again."""
    for point in points:
        if isinstance(point, WeightQuantizer):
            point.release()
