"""The calibration of a run: every point decided by its stage, with what earlier runs gathered and left unfinished."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.calibration.algorithm import ALGORITHMS, Corrector, RangeSetter, Rounding, Transform
from wrapq.calibration.data import Samples
from wrapq.calibration.offload import Offload, shared_tensors
from wrapq.calibration.recall import Recall
from wrapq.calibration.residency import FloatBlocks
from wrapq.calibration.store import Store
from wrapq.calibration.walker import Batch, Walker
from wrapq.engine.context import Run
from wrapq.engine.folder import SCRATCH
from wrapq.engine.lock import code_digest, device_class, environment
from wrapq.engine.resume import Keeper
from wrapq.resolve.plan import Plan
from wrapq.wrappers.attention import Attention
from wrapq.wrappers.experts import Experts
from wrapq.wrappers.model import iter_wrapped

LATER_JOBS = "later_jobs"
"""What `Run.seconds` calls the time that was spent on other jobs, which is not in the run's total."""
_SHOWN = 8
_log = logging.getLogger(__name__)


def calibrate(
    run: Run, model: nn.Module, samples: Samples | None, weights: Mapping[str, Tensor] | None = None
) -> Walker:
    """Decide every point of a wrapped model: round weights, choose activation ranges.

    Args:
        run: the run.
        model: the model.
        samples: calibration data, None where no stage looks at any.
        weights: where the parameters of blocks are read from; None where all of them are in memory.
    """
    config = run.plan.recipe.calibration
    batches = [] if samples is None else make_batches(samples, config.batch_size, run.device)
    walker = make_walker(run, model, bool(batches))
    keeper = Keeper(run.folder, _fingerprint(run), run.device)
    if weights is not None:
        walker.residency = FloatBlocks(model, weights, run.device, keeper)
    border = keeper.take_up(walker)
    if border is not None:
        run.note(f"resumed before block {border.index}; what was decided before is kept")
    walker.on_hidden = keeper.keep_hidden
    if not run.processes.rank:
        walker.on_border = partial(keeper.keep, walker)
    title = "Calibrating" if batches else "Rounding weights"
    with run.step("calibrate", title, *walker.steps()) as advance, offloading(run, walker) as offload:
        walker.advance, walker.offload = advance, offload
        walker.run(batches, config.schedule, border)
    _tell(run, walker)
    return walker


def make_walker(run: Run, model: nn.Module, looks_at_data: bool) -> Walker:
    """The walker that decides the points of the plan, with the store where it looks at data."""
    rounders, setters, correctors = _algorithms(run.plan)
    walker, runtime = Walker(model, rounders, setters), run.settings.runtime
    walker.correctors, walker.processes, walker.others = correctors, run.processes, run.others
    if looks_at_data and runtime.cache_gb:
        walker.recall = Recall(Store(run.settings.paths.cache_folder(), runtime.cache_gb * 1e9), _root(run, model))
    return walker


def _algorithms(plan: Plan) -> tuple[dict[str, Rounding], dict[str, RangeSetter], dict[str, list[Corrector]]]:
    """What decides each weight, and each static activation, and what corrects each weight, by the point's full name."""
    rounders: dict[str, Rounding] = {}
    setters: dict[str, RangeSetter] = {}
    correctors: dict[str, list[Corrector]] = {}
    for stage in plan.stages:
        kind = ALGORITHMS.get(stage.algorithm)
        algorithm = kind(kind.Options(**stage.options))
        if isinstance(algorithm, Transform):
            continue
        if isinstance(algorithm, Corrector):
            for target in stage.targets:
                correctors.setdefault(target, []).append(algorithm)
            continue
        table: dict[str, Any] = rounders if isinstance(algorithm, Rounding) else setters
        table |= dict.fromkeys(stage.targets, algorithm)
    return rounders, setters, correctors


def float_root(run: Run, model: nn.Module) -> dict[str, str]:
    """All that the outputs of the run's wrapped float model, after its transforms, depend on beside what comes in."""
    recipe, run_as = run.plan.recipe, _fingerprint(run)
    data = {"calibration": run_as.pop("calibration", ""), "batch_size": recipe.calibration.batch_size}
    how: dict[str, object] = {"dtype": recipe.model.dtype, "forwards": _forwards(model)}
    changed = [(s.algorithm, s.options, s.targets) for s in run.plan.stages if s.phase == "transform"]
    if changed:  # what some of them do depends on how the weights will be quantized
        specs = {f"{m.name}.{p.name}": p.spec for m in run.plan.modules for p in m.points}
        how |= {"transforms": changed, "specs": specs, "data": data}
    return {key: value for key, value in run_as.items() if key != "plan"} | {"how": json.dumps(how)}


def _forwards(model: nn.Module) -> list[str]:
    """The modules of a wrapped float model that other code runs than their own, which may sum in another order."""
    other = [name for name, m in iter_wrapped(model) if m.wrapper.replaces_forward or isinstance(m, Attention)]
    return sorted([*other, *(name for name, module in model.named_modules() if isinstance(module, Experts))])


def _root(run: Run, model: nn.Module) -> dict[str, str]:
    """All that every statistic of the run depends on, beside what is decided in its course."""
    data = {"calibration": run.digests["calibration"], "batch_size": str(run.plan.recipe.calibration.batch_size)}
    return float_root(run, model) | data


@contextmanager
def offloading(run: Run, walk: Walker) -> Iterator[Offload]:
    """What waiting forwards hold is kept within the limit that the settings set."""
    with tempfile.TemporaryDirectory(dir=run.folder.path, prefix=SCRATCH) as folder:
        offload = Offload(Path(folder), run.settings.runtime.offload_gb * 1e9, shared_tensors(walk))
        yield offload
    if offload.written:
        run.note(f"{offload.written / 1e9:.1f} GB of activations went through the disk (runtime.offload_gb)")


def _tell(run: Run, walker: Walker) -> None:
    """What a reader of the run should know of its calibration."""
    if run.processes.rank:
        return
    for reason in walker.fallbacks:
        _log.warning("fallback: %s", reason)
    for reason in walker.fallbacks[:_SHOWN]:
        run.note(f"fallback: {reason}")
    if (more := len(walker.fallbacks) - _SHOWN) > 0:
        run.note(f"{more} more fallbacks, all of them in log.txt")
    run.tracker.metrics({"fallbacks": len(walker.fallbacks)})
    if run.processes.count > 1:
        run.note(
            f"{run.processes.count} processes shared the data: as in one up to the order in which floats are summed"
        )
    if (recall := walker.recall) is None:
        return
    run.tracker.metrics(
        {
            "cache/hits": recall.hits,
            "cache/misses": recall.misses,
            "cache/rounded": recall.rounded,
            "cache/seconds_saved": recall.seconds,
        }
    )
    if recall.hits:
        known = f"{recall.hits} of {recall.hits + recall.misses} points"
        run.note(f"statistics of {known} read from {recall.store.folder}, which saved {recall.seconds:.1f} s")
    if recall.rounded:
        run.note(f"{recall.rounded} weights had been rounded along with those of an earlier job")
    if recall.left:  # those jobs have it for nothing, and this one shall not look slower for it
        run.seconds["calibrate"] -= walker.others_seconds
        run.seconds[LATER_JOBS] = walker.others_seconds
        took = f"in {walker.others_seconds:.1f} s that do not count as this one's"
        run.note(f"{recall.left} weights were rounded for the jobs that follow, {took}")
    if recall.problem:
        run.note(f"no more statistics are kept for later runs: {recall.problem}")
    recall.store.collect()


def _fingerprint(run: Run) -> dict[str, str]:
    """What must be equal for a run to be taken up."""
    digests = {key: run.digests[key] for key in ("model", "plan", "calibration") if key in run.digests}
    machine = {
        "device": device_class(run.device),
        "processes": str(run.processes.count),
        "environment": json.dumps(environment(), sort_keys=True),
    }
    return digests | machine | {"code": code_digest()}


def make_batches(samples: Samples, size: int, device: torch.device) -> list[Batch]:
    """Samples as the arguments of forwards, `size` sequences at a time."""
    batches = []
    for ids, mask in samples.batches(size):
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        batches.append(Batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask))
    return batches


def weight_curves(walker: Walker) -> dict[str, list[float]]:
    """For each weight of a block, such as `mlp.down_proj`, its figures over the blocks."""
    curves: dict[str, list[float]] = {}
    for where, report in walker.reports.items():
        if walker.blocks.index(where) is not None:
            weight = where.removeprefix(walker.blocks.prefix).split(".", 2)[2].removesuffix(".weight")
            for figure in ("weight_sqnr_db", "output_error"):
                if figure in report:
                    curves.setdefault(f"{figure}/{weight}", []).append(report[figure])
    return curves
