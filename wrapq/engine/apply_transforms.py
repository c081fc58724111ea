"""The transforms of a run: the float model changed in the order of the stack, and its outputs compared after each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wrapq.algorithms.transform import BATCHES, Transform
from wrapq.calibration.float_pass import collect_statistics
from wrapq.calibration.processes import Processes
from wrapq.data.samples import Samples
from wrapq.engine.calibrate import make_batches
from wrapq.engine.context import Run
from wrapq.errors import ModelError, and_more
from wrapq.graph.blocks import Batch, output_head, output_hidden_states
from wrapq.graph.dataflow import find_graph
from wrapq.graph.head import Head
from wrapq.graph.online import after_online
from wrapq.graph.rewriter import GraphRewriter
from wrapq.resolve.stages import algorithm_of
from wrapq.runtime.prefix import keep_prefix
from wrapq.statistics.input import InputStatistics
from wrapq.statistics.transport import transform_statistics
from wrapq.wrappers.experts import take_apart

Figures = Mapping[str, Mapping[str, float]]
"""The figures that a transform returns, by target."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""How far the outputs may move, relative to their norm: rounding in the dtype that the model computes in. Weights of 16
bits that are scaled are rounded once more: AWQ moves the logits of Gemma 3 270M by 0.11 in bfloat16, and by less than
1e-4 in float32."""
_OF_TEXT = {"input_ids", "attention_mask", "use_cache"}
_COMPARED = 1 << 24  # logits
_SYNTHETIC = (2, 32)  # [B, T] of token ids where the recipe reads no calibration data
_log = logging.getLogger(__name__)


def transform(run: Run, model: nn.Module, samples: Samples | None) -> None:
    """Run the transforms of the plan on a float model, in place; experts that are quantized are modules afterwards, and
    the tokens of a float prefix are told from the others from then on.

    Raises:
        ModelError: one of them changed the model's function; the model is as it was before it.
    """
    if run.plan.recipe.float_prefix:
        keep_prefix(model, run.plan.recipe.float_prefix)
    stages = [stage for stage in run.plan.stages if stage.phase == "transform" and stage.targets]
    if not stages:
        return
    batches, specs = make_batches(run, samples), run.plan.specs()
    rewriter = GraphRewriter(take_apart(model, specs), find_graph(take_apart(run.source.meta_model(), specs)), specs)
    probe = batches[0] if batches else _random_tokens(model)
    with run.step("transform", "Transforming", len(stages), "stage") as advance:
        for stage in stages:
            algorithm = algorithm_of(stage)
            if not isinstance(algorithm, Transform):
                raise ModelError(f"{stage.algorithm} is no transform")
            with checked(rewriter, probe, stage.name, algorithm.tolerance) as change:
                figures = apply_transform(rewriter, algorithm, stage.targets, batches, run.processes)
            curves: dict[str, list[float]] = {}  # one for each figure, over the targets in order
            for target, values in figures.items():
                shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                _log.info("%s: %s: %s", stage.name, target, shown)
                for name, value in values.items():
                    curves.setdefault(f"transform/{stage.name}/{name}", []).append(value)
            run.tracker.metrics({f"transform/{stage.name}/change": change[0]})
            run.tracker.curves(curves)
            advance()
    for note in rewriter.notes:
        run.note(note)


@contextmanager
def checked(rewriter: GraphRewriter, probe: Batch, name: str, tolerance: float | None = None) -> Iterator[list[float]]:
    """Compare the model's outputs before and after the context; undo everything if they moved or an error was raised.

    Yields a list that holds the relative change afterwards.

    Raises:
        ModelError: the outputs moved further than `tolerance`, or than rounding explains where it is None.
    """
    before, change = outputs(rewriter.model, probe), [0.0]
    rounding = TOLERANCES.get(next(rewriter.model.parameters()).dtype, TOLERANCES[torch.float32])
    allowed = rounding if tolerance is None else tolerance
    try:
        yield change
        after = outputs(rewriter.model, probe)
        change[0] = float((after - before).norm() / before.norm())
        _log.info("%s moved the outputs of the float model by %.2g", name, change[0])
        if not change[0] <= allowed:  # NaN is no less either
            limit = "rounding explains" if tolerance is None else "it may move them by"
            raise ModelError(
                f"{name} changed the function of the float model: its outputs moved by {change[0]:.2g} relative to "
                f"their norm, and {limit} {allowed:g}; the model was put back as it was"
            )
    except BaseException:
        rewriter.undo_log.restore()
        raise
    rewriter.undo_log.commit()


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """The first output of a forward, in float64, of real tokens only, and of many logits those of every n-th."""
    mask = batch.mask
    if batch.inputs.keys() <= _OF_TEXT and output_head(model) is not None:
        head, ids = Head(model), batch.inputs["input_ids"]
        count = next(head.parts(ids.shape, elements=_COMPARED)).stop
        some = slice(None, None, -(-ids.shape[1] // count))
        first = head.logits(head.hidden(ids, batch.inputs.get("attention_mask")), some)
        mask = None if mask is None else mask[:, some]
    else:
        first = output_hidden_states(model(**batch.inputs))
    if mask is not None and first.shape[:2] == mask.shape:
        first = first[mask.bool()]
    return first.double()


def _random_tokens(model: nn.Module) -> Batch:
    """A batch of token ids for a recipe without calibration data."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, _SYNTHETIC, generator=torch.Generator().manual_seed(0))
    return Batch({"input_ids": ids.to(next(model.parameters()).device)})


def apply_transform(
    rewriter: GraphRewriter,
    algorithm: Transform,
    targets: Sequence[str],
    batches: Sequence[Batch],
    processes: Processes,
) -> Figures:
    """Apply a transform to all its targets, in one pass over the batches where it needs statistics.

    A target is changed as soon as the statistics of all its inputs are complete, which are dropped when no other target
    waits for them. The rewriter's graph is the one for transforms that come after.
    """
    online = algorithm.online(rewriter.graph, targets)
    figures = _applied(rewriter, algorithm, targets, batches, processes)
    rewriter.graph = after_online(rewriter.graph, online, type(algorithm).__name__)
    return figures


def _applied(
    rewriter: GraphRewriter,
    algorithm: Transform,
    targets: Sequence[str],
    batches: Sequence[Batch],
    processes: Processes,
) -> Figures:
    rewriter.batches, needed = batches, frozenset(algorithm.needs) - {BATCHES}
    if not needed:
        return {target: algorithm.apply(rewriter, target, {}) for target in targets}
    inputs = {target: algorithm.inputs(rewriter.graph, target) for target in targets}
    waiting = dict(inputs)
    gathered: dict[str, InputStatistics] = {}
    figures: dict[str, Mapping[str, float]] = {}
    unreached: dict[str, None] = {}
    before = {name: len(rewriter.input_changes.get(name, ())) for names in inputs.values() for name in names}

    def current(name: str) -> InputStatistics:
        changes = rewriter.input_changes.get(name, [])[before[name] :]  # by targets that share a part of the input
        return transform_statistics(gathered[name], changes, name) if changes else gathered[name]

    def complete(statistics: Mapping[str, InputStatistics]) -> None:
        gathered.update(statistics)
        for target in [target for target, names in waiting.items() if set(names) <= set(gathered)]:
            names = waiting.pop(target)
            unreached.update(dict.fromkeys(name for name in names if not gathered[name].rows))
            if reached := {name: current(name) for name in names if gathered[name].rows}:
                figures[target] = algorithm.apply(rewriter, target, reached)
        awaited = {name for names in waiting.values() for name in names}
        for name in [name for name in gathered if name not in awaited]:
            del gathered[name]

    needs = {name: needed for names in inputs.values() for name in names}
    collect_statistics(rewriter.model, batches, needs, complete, processes)
    if unreached:
        note = (
            f"{type(algorithm).__name__} saw no input of {and_more(tuple(unreached))}: no calibration token came there"
        )
        skipped = [target for target in targets if target not in figures]
        rewriter.notes.append(f"{note}; it leaves {and_more(skipped)} alone" if skipped else note)
    return figures
