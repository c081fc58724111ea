"""The calibration of a run: every point finalized by its stage, from cached statistics and from where a run stopped."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wrapq.calibration.assignments import Assignments
from wrapq.calibration.block_loader import IN_MEMORY, StreamedBlocks
from wrapq.calibration.offload import Offload
from wrapq.calibration.pt2e_parts import quantize_parts
from wrapq.calibration.token_weights import TokenWeights, gather_token_weights, linears_by_gradient
from wrapq.calibration.walker import Schedule, Walker, WalkOptions
from wrapq.data.samples import Samples
from wrapq.engine.context import Run
from wrapq.graph.blocks import Batch
from wrapq.resolve.part_plans import quantizer_of
from wrapq.resolve.stages import algorithm_of
from wrapq.runs.folder import SCRATCH
from wrapq.runs.lock import code_digest, device_class, environment
from wrapq.runs.resume import ResumeStore
from wrapq.statistics.cache import StatisticsCache, StoreUse, digest
from wrapq.statistics.store import Store
from wrapq.wrappers.attention import Attention
from wrapq.wrappers.experts import Experts
from wrapq.wrappers.model import iter_wrapped

_SHOWN = 8
_log = logging.getLogger(__name__)


def calibrate(
    run: Run, model: nn.Module, samples: Samples | None, weights: Mapping[str, Tensor] | None = None
) -> Walker:
    """Decide every point of a wrapped model: round weights, choose activation ranges.

    `samples` is None where no stage looks at data, `weights` where no parameters have to be read block by block.
    """
    batches, schedule = make_batches(run, samples), run.plan.recipe.calibration.schedule
    store = ResumeStore(run.folder, _fingerprint(run), run.device, run.note_once, run.processes)
    loader = IN_MEMORY if weights is None else StreamedBlocks(model, weights, run.device, store)
    title = "Calibrating" if batches else "Rounding weights"
    walker = walk(run, model, batches, schedule, "calibrate", title, loader=loader, checkpoints=store)
    if not run.processes.rank:
        _tell(run, walker)
    return walker


def calibrate_parts(run: Run, model: nn.Module, samples: Samples | None) -> None:
    """Let PT2E quantize its parts of a calibrated model, on all of the calibration data."""
    quantizers = {part.name: quantizer_of(part) for part in run.plan.parts}
    batches = make_batches(run, samples)
    with run.step("calibrate_parts", "Calibrating for PT2E", len(batches), "batch") as advance:
        quantize_parts(model, quantizers, batches, advance)


def walk(
    run: Run, model: nn.Module, batches: Sequence[Batch], schedule: Schedule, step: str, title: str, **options: Any
) -> Walker:
    """Finalize the points of the plan in a step of the run, with the cache where there is data, and other `options`."""
    runtime = run.settings.runtime
    if batches and runtime.cache_gb:
        data = {"calibration": run.digests["calibration"], "batch_size": str(run.plan.recipe.calibration.batch_size)}
        store = Store(run.settings.paths.cache_folder(), runtime.cache_gb * 1e9)
        options["cache"] = StatisticsCache(store, float_root(run, model) | data)
    assignments = Assignments.from_stages((algorithm_of(stage), stage.targets) for stage in run.plan.stages)
    options["token_weights"] = _token_weights(run, model, batches, assignments, options.get("cache"))
    with offloading(run, model) as offload:
        walker = Walker(model, assignments, WalkOptions(run.processes, offload=offload, **options))
        if (checkpoint := walker.checkpoint) is not None:
            run.note(f"resumed before block {checkpoint.index}; what was decided before is kept")
        with run.step(step, title, *walker.steps()) as advance:
            walker.run(batches, schedule, advance)
    return walker


def _token_weights(
    run: Run, model: nn.Module, batches: Sequence[Batch], assignments: Assignments, cache: StatisticsCache | None
) -> TokenWeights:
    """Those of the linear layers that want them, from the cache where it has them; before any point is restored, since
    they are of the float model."""
    if not (modules := linears_by_gradient(model, assignments)):
        return {}
    with run.step("gradients", "Gathering gradients", len(batches), "batch") as advance:
        key = digest("token weights", [cache.root, run.processes.rank, sorted(modules)]) if cache else ""
        if cache is not None and (stored := cache.store.get(key)) is not None:
            found: dict[str, dict[int, Tensor]] = {}
            for key, tensor in stored.tensors.items():
                name, _, number = key.rpartition(" ")
                found.setdefault(name, {})[int(number)] = tensor.to(run.device)
            return found
        started = time.perf_counter()
        weights = gather_token_weights(model, run.processes.share(batches), modules, advance)
        if cache is not None:
            named = {f"{name} {number}": tensor for name, each in weights.items() for number, tensor in each.items()}
            cache.write(key, named, {"kind": "weights of tokens"}, time.perf_counter() - started)
    return weights


def float_root(run: Run, model: nn.Module) -> dict[str, str]:
    """All that the outputs of the run's wrapped float model, after its transforms, depend on beside what comes in."""
    recipe, root = run.plan.recipe, _fingerprint(run)
    # other code than their own runs these modules, and may sum in another order
    forwards = [name for name, m in iter_wrapped(model) if m.wrapper.replaces_forward or isinstance(m, Attention)]
    forwards += [name for name, module in model.named_modules() if isinstance(module, Experts)]
    how: dict[str, object] = {"dtype": run.plan.model.dtype, "forwards": sorted(forwards)}
    changed = [(s.algorithm, s.options, s.targets) for s in run.plan.stages if s.phase == "transform"]
    if changed:  # what some of them do depends on how the weights will be quantized
        specs = {f"{m.name}.{p.name}": p.spec for m in run.plan.modules for p in m.points}
        how |= {"transforms": changed, "specs": specs}
        how |= {"calibration": root.get("calibration"), "batch_size": recipe.calibration.batch_size}
    return {key: value for key, value in root.items() if key not in ("plan", "calibration")} | {"how": json.dumps(how)}


@contextmanager
def offloading(run: Run, model: nn.Module) -> Iterator[Offload]:
    """An offload in the run's folder, with the limit of memory that the settings give."""
    with tempfile.TemporaryDirectory(dir=run.folder.path, prefix=SCRATCH) as folder:
        offload = Offload(Path(folder), run.settings.runtime.offload_gb * 1e9, model)
        yield offload
    if offload.written:
        run.note(f"{offload.written / 1e9:.1f} GB of activations went through the disk (runtime.offload_gb)")


def _tell(run: Run, walker: Walker) -> None:
    """Note fallbacks, processes and the use of the cache for the reader of the run."""
    fallbacks = walker.result.fallbacks
    for reason in fallbacks:
        _log.warning("fallback: %s", reason)
    for reason in fallbacks[:_SHOWN]:
        run.note(f"fallback: {reason}")
    if (more := len(fallbacks) - _SHOWN) > 0:
        run.note(f"{more} more fallbacks, all of them in log.txt")
    run.tracker.metrics({"fallbacks": len(fallbacks)})
    if run.processes.count > 1:
        run.note(
            f"{run.processes.count} processes shared the data: as in one up to the order in which floats are summed"
        )
    if (cache := walker.options.cache) is not None:
        tell_cache(run, cache, "", "statistics of {} points")


def tell_cache(run: Run, cache: StoreUse, prefix: str, read: str) -> None:
    """Record what the run read from the store, of how many in `read`, and why it wrote nothing more; make room in it.

    A store that cannot be written costs later runs time, not this one its result.
    """
    figures = {"hits": cache.hits, "misses": cache.misses, "seconds_saved": cache.seconds}
    run.tracker.metrics({f"cache/{prefix}{name}": value for name, value in figures.items()})
    if cache.hits:
        known = read.format(f"{cache.hits} of {cache.hits + cache.misses}")
        run.note(f"{known} read from {cache.store.folder}, which saved {cache.seconds:.1f} s")
    if problem := cache.tidy():
        run.note_once(f"nothing more is kept for later runs: {problem}")


def _fingerprint(run: Run) -> dict[str, str]:
    """Digests of everything that must be equal for a run to be resumed."""
    digests = {key: run.digests[key] for key in ("model", "calibration") if key in run.digests}
    return digests | {
        "plan": run.plan.digest(),
        "device": device_class(run.device),
        "processes": str(run.processes.count),
        "environment": json.dumps(environment(), sort_keys=True),
        "code": code_digest(),
    }


def make_batches(run: Run, samples: Samples | None) -> list[Batch]:
    """Calibration data as the arguments of forwards; none where no stage looks at any."""
    size = run.plan.recipe.calibration.batch_size
    return [
        Batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask)
        for ids, mask, _ in (samples.batches(size, run.device) if samples else ())
    ]
