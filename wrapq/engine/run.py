"""A run: the execution of one plan, from data to a checked checkpoint, with its record."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.data import Samples, build_samples
from wrapq.calibration.processes import Processes
from wrapq.calibration.residency import Residency, run_blockwise
from wrapq.calibration.sources.base import make_source
from wrapq.calibration.walker import Walker
from wrapq.engine.blockwise import blockwise_files, load_blockwise, save_blockwise
from wrapq.engine.calibrate import calibrate, offloading, weight_curves
from wrapq.engine.checkpoint import MANIFEST, WEIGHTS, load, qparams_tensors, save_model, tensors_digest
from wrapq.engine.context import Run
from wrapq.engine.export import Exported, export_model
from wrapq.engine.folder import RunFolder
from wrapq.engine.kernels import check_kernels, record_kernels
from wrapq.engine.lock import lock_text
from wrapq.engine.measure import Quality, device_of, forward_logits, measure_stages
from wrapq.engine.progress import Progress
from wrapq.engine.record import RunResult, close_record, open_record, record_data, record_failure, tell_problems
from wrapq.engine.resume import find_unfinished
from wrapq.engine.transform import transform
from wrapq.errors import ModelError, PlanError, Problem
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Settings
from wrapq.resolve.exporter import NONE
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runtime.kernel import REFERENCE
from wrapq.tracking import Tracker, make_tracker
from wrapq.tracking.null import NullTracker
from wrapq.wrappers.model import convert_model, wrap_model


def run(
    recipe: str = "demo", overrides: Sequence[str] = (), progress: Progress | None = None, resume: bool = False
) -> RunResult | None:
    """Run a recipe by name or file, with Hydra overrides; what `wrapq run` does.

    Raises:
        RecipeError, PlanError: before anything is loaded or written.
        WrapqError: see `execute`.
    """
    composed = compose([f"recipe={recipe}", *overrides])
    plan = resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code)
    return execute(plan, composed.settings, progress or Progress(), resume)


def execute(
    plan: Plan, settings: Settings, progress: Progress, resume: bool = False, tracker: Tracker | None = None
) -> RunResult | None:
    """Execute a plan and leave its folder and its tracked run.

    Under `torchrun` the processes share the calibration data; the first does all the rest and has the result, None is
    the others'.

    With `resume` the newest run of the recipe that did not finish is taken up after its last finished block.

    Whatever happens, the folder says how the run ended and the tracked run is closed; files are whole or absent.

    Raises:
        OutputError: the outputs folder cannot be written, or its disk is full.
        CalibrationError, ModelError, LifecycleError: from the data, the model, a point that no data reached.
    """
    check_kernels(settings.runtime.kernels)
    processes = Processes.from_environment()
    check_streaming(plan, settings, processes)
    device = use_machine(settings, plan.recipe.seed, processes)
    with processes.joined(device):
        folder = _folder(plan, settings, resume, processes)
        if processes.rank:
            _assist(Run(plan, settings, folder, NullTracker(), Progress(), device, processes))
            return None
        tracker = tracker or make_tracker(settings)
        with folder.log():
            try:
                return _execute(Run(plan, settings, folder, tracker, progress, device, processes))
            except BaseException as error:
                record_failure(folder, tracker, error)
                raise


def check_streaming(plan: Plan, settings: Settings, processes: Processes) -> None:
    """Raise `PlanError` where the settings ask for streaming and it cannot be done."""
    if settings.runtime.load != "streaming":
        return
    problems = []
    if not plan.model.block_count:
        problems.append((f"{plan.model.type} has no repeated blocks to bring in one at a time", "leave it out"))
    if plan.recipe.export.format != NONE:
        what = f"the export {plan.recipe.export.format} is made and compared with the whole model in memory"
        problems.append((what, "leave the export to `wrapq export`, where there is memory"))
    if any(stage.phase == "transform" for stage in plan.stages):
        problems.append(("transforms change the model as a whole", "leave them out, or use runtime.load=whole"))
    if processes.count > 1:
        problems.append(("several processes cannot stream one model yet", "use one process, or runtime.load=whole"))
    if any(stage.phase == "transform" for stage in plan.stages):
        what = "transforms change the float model as a whole before the first block is calibrated"
        problems.append((what, "leave runtime.load as it is, or remove the transforms"))
    if problems:
        raise PlanError([Problem("runtime.load", f"streaming: {what}", (), remedy) for what, remedy in problems])


def _folder(plan: Plan, settings: Settings, resume: bool, processes: Processes) -> RunFolder:
    """The folder of the run, which the first process finds or makes."""
    outputs, name, size = Path(settings.paths.outputs), plan.recipe.name, plan.estimate.quantized_bytes
    path = ""
    if not processes.rank:
        path = str((find_unfinished(outputs, name) if resume else RunFolder.create(outputs, name, size)).path)
    return RunFolder(Path(processes.said_by_first(path)))


def _assist(run: Run) -> None:
    """The part of a process that only walks its share of the calibration data."""
    source = ModelSource(run.plan.recipe.model, run.settings.runtime.trust_remote_code)
    calibration, _ = _read_data(run, source.tokenizer())
    _calibrate(run, source, calibration)


def _execute(run: Run) -> RunResult:
    start = time.perf_counter()
    source = ModelSource(run.plan.recipe.model, run.settings.runtime.trust_remote_code)
    open_record(run)
    with run.step("data", "Reading data"):
        calibration, evaluation = _read_data(run, source.tokenizer())
        run.tracker.ready()  # opened beside the reading; a store that refuses the run must not cost a calibration
        tell_problems(run)
    model, walker = _calibrate(run, source, calibration)
    quality = _measure(run, walker, evaluation)
    if run.streaming:
        exported = None
        _finish_blockwise(run, walker, source, evaluation)
    else:
        exported = _finish(run, model, walker, source, evaluation)
    run.seconds["total"] = time.perf_counter() - start
    return close_record(run, quality, exported)


def _finish(run: Run, model: nn.Module, walker: Walker, source: ModelSource, evaluation: Samples) -> Exported | None:
    """Convert, save, check, export, and measure kernels."""
    with run.step("convert", "Converting"):
        model, outputs = _convert(model, evaluation, run)
    with run.step("save", "Saving and checking the saved model"), run.folder.all_or_none(MANIFEST, WEIGHTS):
        save_model(model, run.folder)
        _save_record(run, qparams_tensors(model), walker, source)
        _check_saved(run, _first_logits(load(run.folder.path, run.device), evaluation), outputs)
    exported = _export(run, model)
    with run.step("kernels", "Measuring kernels"):
        run.kernels = record_kernels(model, run.settings.runtime.kernels, run.folder, run.tracker)
    return exported


def _finish_blockwise(run: Run, walker: Walker, source: ModelSource, evaluation: Samples) -> None:
    """Convert, save and check, one block at a time; what is saved must have the outputs of the model it comes from."""
    with run.step("convert", "Computing what the saved model must give"):
        outputs = _first_logits(walker.model, evaluation, walker.residency)
        run.digests["outputs"] = tensors_digest({"logits": outputs})
    files = blockwise_files(walker.blocks)
    with run.step("save", "Converting, saving and checking block by block"), run.folder.all_or_none(MANIFEST, *files):
        qparams = save_blockwise(walker.model, walker.residency, run.folder)
        _save_record(run, qparams, walker, source)
        saved, residency = load_blockwise(run.folder.path, run.device, walker.blocks)
        _check_saved(run, _first_logits(saved, evaluation, residency), outputs)
    if run.settings.runtime.kernels != REFERENCE:
        run.note("kernels are not measured where blocks are streamed; wrapq.load(..., runtime='auto') measures them")


def _calibrate(run: Run, source: ModelSource, calibration: Samples | None) -> tuple[nn.Module, Walker]:
    with run.step("load", "Loading the model"):
        model, weights = source.open_blocks(run.device) if run.streaming else (source.load(run.device), None)
        run.digests["model"] = source.digest()
    transform(run, model, source, calibration)
    model = wrap_model(model, run.plan.specs())
    return model, calibrate(run, model, calibration, weights)


def _read_data(run: Run, tokenizer: Any) -> tuple[Samples | None, Samples]:
    """Calibration samples, None where no stage looks at data, and evaluation samples."""
    recipe, calibration = run.plan.recipe, None
    if run.plan.needs_calibration:
        config = recipe.calibration
        source = make_source(config.source, config.options)
        calibration = build_samples(source, tokenizer, config.samples, config.seq_len, config.seed, config.pack)
        record_data(run, "calibration", source, calibration)
    measured = recipe.evaluation
    source = make_source(measured.source, measured.options)
    windows = max(1, measured.tokens // measured.seq_len)
    evaluation = build_samples(source, tokenizer, windows, measured.seq_len, seed=None)
    record_data(run, "evaluation", source, evaluation)
    if calibration is not None and calibration.digest == evaluation.digest:
        run.note("calibration and evaluation read the same tokens: the quality measured is too good")
    return calibration, evaluation


def _measure(run: Run, walker: Walker, samples: Samples) -> Quality:
    size = run.plan.recipe.evaluation.batch_size
    steps = (walker.blocks.count, "block") if run.streaming else (-(-len(samples.input_ids) // size), "batch")
    with run.step("evaluate", "Measuring quality", *steps) as advance, offloading(run, walker) as offload:
        quality = measure_stages(walker.model, samples, size, advance, walker.residency, offload)
    for stage, metrics in quality.stages.items():
        run.tracker.metrics({f"{stage}/{name}": value for name, value in metrics.items() if name != "tokens"})
    run.tracker.curves(quality.curves)
    return quality


def _convert(model: nn.Module, samples: Samples, run: Run) -> tuple[nn.Module, Tensor]:
    """The converted model and its logits on the first batch, which must be those of the model it comes from."""
    before = _first_logits(model, samples)
    model = convert_model(model)
    after = _first_logits(model, samples)
    if not torch.equal(before, after):
        difference = (before - after).abs().max().item()
        raise ModelError(
            f"conversion changed the outputs (largest difference {difference:g}); this is a defect of wrapq"
        )
    run.digests["outputs"] = tensors_digest({"logits": after})
    return model, after


def _save_record(run: Run, qparams: Mapping[str, Tensor], walker: Walker, source: ModelSource) -> None:
    """What is written beside the model's own files."""
    run.digests["qparams"] = tensors_digest(qparams)
    own = {name: tensor.clone() for name, tensor in qparams.items()}  # tied weights share theirs, which a file may not
    run.folder.write("qparams.safetensors", lambda path: save_file(own, path))
    run.folder.write_text("modules.json", json.dumps(walker.reports, indent=1) + "\n")
    run.tracker.curves(weight_curves(walker))
    if walker.statistics:
        run.folder.write("statistics.safetensors", lambda path: save_file(walker.statistics, path))
    run.folder.write_files(source.tokenizer().save_pretrained)
    lock = lock_text(run.plan.recipe.model_dump(mode="json"), run.digests, run.device)
    run.folder.write_text("recipe.lock.yaml", lock)


def _check_saved(run: Run, outputs: Tensor, expected: Tensor) -> None:
    """The files give back the model, to the bit."""
    if not torch.equal(outputs, expected):
        raise ModelError(f"{run.folder.path} loads as a model with other outputs; this is a defect of wrapq")


def _export(run: Run, model: nn.Module) -> Exported | None:
    if run.plan.recipe.export.format == NONE:
        return None
    with run.step("export", "Exporting and loading the export"):
        exported = export_model(model, run.plan, run.folder.path)
    for text in exported.notes if exported else ():
        run.note(f"export: {text}")
    return exported


@torch.no_grad()
def _first_logits(model: nn.Module, samples: Samples, residency: Residency | None = None) -> Tensor:
    """The logits [1, T, V] of the first sample."""
    ids, mask = next(samples.batches(1))
    device, logits = device_of(model), []

    def forward() -> None:
        logits.append(forward_logits(model, ids.to(device), None if mask is None else mask.to(device)).cpu())

    if residency is None:
        forward()
    else:
        run_blockwise(model, residency, [forward])
    return logits[0]


def use_machine(settings: Settings, seed: int, processes: Processes | None = None) -> torch.device:
    """Threads, seed and device as the settings say; of several processes each takes a GPU of its own."""
    if settings.runtime.threads:
        torch.set_num_threads(settings.runtime.threads)
    torch.manual_seed(seed)
    name = settings.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"runtime.device={settings.runtime.device}: this machine has no CUDA device; use cpu or auto")
    if name == "cuda" and processes is not None and processes.count > 1:
        name = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(name)
    return torch.device(name)
