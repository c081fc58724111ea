"""The transforms of a run: the float model changed in the order of the stack, and its outputs compared after each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import ALGORITHMS, RUNS, Transform
from wrapq.calibration.data import Samples
from wrapq.calibration.forward import Batch
from wrapq.calibration.gather import Gathered, Gatherer
from wrapq.calibration.graph import find_graph
from wrapq.calibration.processes import Processes
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.calibration.transport import carry
from wrapq.engine.calibrate import make_batches
from wrapq.engine.context import Run
from wrapq.errors import ModelError
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import StagePlan
from wrapq.tracking.base import Tracker
from wrapq.wrappers.experts import take_apart

Figures = Mapping[str, Mapping[str, float]]
"""What a transform reports, by target."""

BANDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far the outputs may move, relative to their norm: rounding in the dtype that the model computes in."""
_SYNTHETIC = (2, 32)  # [B, T] of token ids where the recipe reads no calibration data
_log = logging.getLogger(__name__)


def transform(run: Run, model: nn.Module, source: ModelSource, samples: Samples | None) -> None:
    """Run the transforms of the plan on a float model, in place; experts that it quantizes are modules from there on.

    Raises:
        ModelError: one of them changed the model's function; the model is as it was before it.
    """
    stages = [stage for stage in run.plan.stages if stage.phase == "transform"]
    if not stages:
        return
    config = run.plan.recipe.calibration
    batches = [] if samples is None else make_batches(samples, config.batch_size, run.device)
    specs = run.plan.specs()
    surgeon = Surgeon(take_apart(model, specs), find_graph(take_apart(source.meta_model(), specs)), specs)
    with run.step("transform", "Transforming", len(stages), "stage") as advance:
        for stage in stages:
            change, figures = apply_transform(surgeon, make(stage), stage, batches, run)
            run.tracker.metrics({f"transform/{stage.name}/change": change})
            record_figures(run.tracker, stage.name, figures)
            advance()
    for note in surgeon.notes:
        run.note(note)


def make(stage: StagePlan) -> Transform:
    """The transform of a stage."""
    kind = ALGORITHMS.get(stage.algorithm)
    algorithm = kind(kind.Options(**stage.options))
    if not isinstance(algorithm, Transform):
        raise ModelError(f"{stage.algorithm} is no transform")
    return algorithm


def record_figures(tracker: Tracker, stage: str, figures: Figures) -> None:
    """Track what a transform reports of its targets: one curve for each figure, over the targets in order."""
    curves: dict[str, list[float]] = {}
    for target, its in figures.items():
        _log.info("%s: %s: %s", stage, target, ", ".join(f"{name} {value:.4g}" for name, value in its.items()))
        for name, value in its.items():
            curves.setdefault(f"transform/{stage}/{name}", []).append(value)
    tracker.curves(curves)


def apply_transform(
    surgeon: Surgeon, algorithm: Transform, stage: StagePlan, batches: Sequence[Batch], run: Run
) -> tuple[float, Figures]:
    """Run one transform; returns how far the outputs moved, relative to their norm, and what it reports of each
    target."""
    probe = batches[0] if batches else synthetic(surgeon.model)
    with checked(surgeon, probe, stage.name, algorithm.band) as change:
        figures = walk(surgeon, algorithm, stage.targets, batches, run.processes)
    return change[0], figures


@contextmanager
def checked(surgeon: Surgeon, probe: Batch, name: str, band: float | None = None) -> Iterator[list[float]]:
    """What is done meanwhile must not move the model's outputs; else, or when it fails, all of it is undone.

    Yields a list that holds the relative change afterwards.

    Raises:
        ModelError: the outputs moved further than `band`, or than rounding explains where it is None.
    """
    before, change = outputs(surgeon.model, probe), [0.0]
    rounding = BANDS.get(next(surgeon.model.parameters()).dtype, BANDS[torch.float32])
    allowed = rounding if band is None else band
    try:
        yield change
        after = outputs(surgeon.model, probe)
        change[0] = float((after - before).norm() / before.norm())
        _log.info("%s moved the outputs of the float model by %.2g", name, change[0])
        if not change[0] <= allowed:  # NaN is no less either
            limit = "rounding explains" if band is None else "it may move them by"
            raise ModelError(
                f"{name} changed the function of the float model: its outputs moved by {change[0]:.2g} relative to "
                f"their norm, and {limit} {allowed:g}; the model was put back as it was"
            )
    except BaseException:
        surgeon.restore()
        raise
    surgeon.commit()


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """The first output of a forward, in float64, without what padding gives."""
    out = model(**batch.inputs)
    first = out if isinstance(out, Tensor) else next(iter(out.values())) if hasattr(out, "values") else out[0]
    if batch.mask is not None and first.shape[:2] == batch.mask.shape:
        first = first[batch.mask.bool()]
    return first.double()


def synthetic(model: nn.Module) -> Batch:
    """A batch of token ids for a model that is given no data."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, _SYNTHETIC, generator=torch.Generator().manual_seed(0))
    return Batch({"input_ids": ids.to(next(model.parameters()).device)})


def walk(
    surgeon: Surgeon, algorithm: Transform, targets: Sequence[str], batches: Sequence[Batch], processes: Processes
) -> Figures:
    """Apply a transform to all its targets, in one pass over the batches where it needs statistics."""
    surgeon.batches, needed = batches, frozenset(algorithm.needs) - {RUNS}
    if not needed:
        return {target: algorithm.apply(surgeon, target, {}) for target in targets}
    inputs = {target: algorithm.inputs(surgeon.graph, target) for target in targets}
    waiting = dict(inputs)
    held: dict[str, InputStatistics] = {}
    figures: dict[str, Mapping[str, float]] = {}
    unreached: dict[str, None] = {}
    before = {name: len(surgeon.transports.get(name, ())) for names in inputs.values() for name in names}

    def current(name: str) -> InputStatistics:
        edits = surgeon.transports.get(name, [])[before[name] :]  # by targets that share the input in part
        return carry(held[name], edits, name) if edits else held[name]

    def done(gathered: Gathered) -> None:
        held.update(gathered)
        for target in [target for target, names in waiting.items() if set(names) <= set(held)]:
            names = waiting.pop(target)
            unreached.update(dict.fromkeys(name for name in names if not held[name].rows))
            if given := {name: current(name) for name in names if held[name].rows}:
                figures[target] = algorithm.apply(surgeon, target, given)
        still = {name for names in waiting.values() for name in names}
        for name in [name for name in held if name not in still]:
            del held[name]

    needs = {name: needed for names in inputs.values() for name in names}
    gatherer = Gatherer(surgeon.model, needs, done)
    gatherer.processes = processes
    gatherer.run(batches)
    surgeon.notes += list(_missing(algorithm, tuple(unreached), [t for t in targets if t not in figures]))
    return figures


def _missing(algorithm: Transform, unreached: Sequence[str], left: Sequence[str]) -> Iterator[str]:
    """What is to be said of modules to which no token came, as to some experts of a mixture."""

    def some(names: Sequence[str]) -> str:
        return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]

    if unreached:
        note = f"{type(algorithm).__name__} saw no input of {some(unreached)}: no calibration token came there"
        yield f"{note}; it leaves {some(left)} alone" if left else note
