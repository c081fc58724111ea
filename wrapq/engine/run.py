"""A run: the execution of one plan, from data to a checked checkpoint, with its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from wrapq.calibration.data import Samples
from wrapq.calibration.processes import Processes
from wrapq.calibration.walker import Walker
from wrapq.engine.blockwise import check_streaming
from wrapq.engine.calibrate import LATER_JOBS, calibrate, offloading
from wrapq.engine.context import Label, Run
from wrapq.engine.finish import finish, finish_blockwise
from wrapq.engine.float_outputs import float_outputs, tell_float_outputs
from wrapq.engine.folder import RunFolder
from wrapq.engine.kernels import check_kernels
from wrapq.engine.measure import Quality, measure_stages
from wrapq.engine.progress import Progress
from wrapq.engine.record import RunResult, close_record, open_record, record_data, record_failure, tell_problems
from wrapq.engine.resume import find_unfinished
from wrapq.engine.samples import calibration_samples, evaluation_samples, read_tokenizer, sources_of
from wrapq.engine.schedules import compare_schedules
from wrapq.engine.transform import transform
from wrapq.errors import ModelError
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Settings
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.tracking import Tracker, make_tracker
from wrapq.tracking.null import NullTracker
from wrapq.wrappers.model import wrap_model


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
    plan: Plan,
    settings: Settings,
    progress: Progress,
    resume: bool = False,
    tracker: Tracker | None = None,
    folder: RunFolder | None = None,
    label: Label = Label(),  # noqa: B008 - immutable
    others: Mapping[str, Sequence[QuantSpec]] = MappingProxyType({}),
) -> RunResult | None:
    """Execute a plan and leave its folder and its tracked run.

    Under `torchrun` the processes share the calibration data; the first does all the rest and has the result, None is
    the others'.

    With `resume` the newest run of the recipe that did not finish is taken up after its last finished block; with
    `folder` the run is made in that one, and taken up if it holds a part of it. `label` tells the run from others,
    and `others` is what other jobs have for weights that are to be rounded along (`Decider.others`).

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
        folder = folder or _folder(plan, settings, resume, processes)
        if processes.rank:
            _assist(Run(plan, settings, folder, NullTracker(), Progress(), device, processes, label))
            return None
        tracker = tracker or make_tracker(settings)
        with folder.log():
            try:
                return _execute(Run(plan, settings, folder, tracker, progress, device, processes, label, others))
            except BaseException as error:
                record_failure(folder, tracker, error)
                raise


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
    calibration, evaluation = _read_data(run, source)
    _calibrate(run, source, calibration)
    compare_schedules(run, source, calibration, evaluation, None)


def _execute(run: Run) -> RunResult:
    start = time.perf_counter()
    source = ModelSource(run.plan.recipe.model, run.settings.runtime.trust_remote_code)
    open_record(run)
    with run.step("data", "Reading data"):
        calibration, evaluation = _read_data(run, source)
        run.tracker.ready()  # opened beside the reading; a store that refuses the run must not cost a calibration
        tell_problems(run)
    model, walker = _calibrate(run, source, calibration)
    quality = _measure(run, walker, evaluation)
    compare_schedules(run, source, calibration, evaluation, quality)
    exported = None
    if run.streaming:
        finish_blockwise(run, walker, source, evaluation, quality)
    else:
        exported = finish(run, model, walker, source, evaluation, quality)
    run.seconds["total"] = time.perf_counter() - start - run.seconds.get(LATER_JOBS, 0)
    return close_record(run, quality, exported)


def _calibrate(run: Run, source: ModelSource, calibration: Samples | None) -> tuple[nn.Module, Walker]:
    with run.step("load", "Loading the model"):
        model, weights = (
            source.open_blocks(run.device, run.plan.specs()) if run.streaming else (source.load(run.device), None)
        )
        run.digests["model"] = source.digest()
    transform(run, model, source, calibration)
    model = wrap_model(model, run.plan.specs())
    return model, calibrate(run, model, calibration, weights)


def _read_data(run: Run, model: ModelSource) -> tuple[Samples | None, Samples]:
    """Calibration samples, None where no stage looks at data, and evaluation samples."""
    calibration, given = None, (read_tokenizer(model, sources_of(run.plan)), model.vocab_size)
    if given[0] is None:
        run.note("the model has no tokenizer that can be read: none is saved with it")
    if (found := calibration_samples(run.plan, *given)) is not None:
        calibration = found[1]
        record_data(run, "calibration", *found)
    source, evaluation = evaluation_samples(run.plan, *given)
    record_data(run, "evaluation", source, evaluation)
    if calibration is not None and calibration.digest == evaluation.digest:
        run.note("calibration and evaluation read the same tokens: the quality measured is too good")
    return calibration, evaluation


def _measure(run: Run, walker: Walker, samples: Samples) -> Quality:
    size = run.plan.recipe.evaluation.batch_size
    steps = (walker.blocks.count, "block") if run.streaming else (-(-len(samples.input_ids) // size), "batch")
    known = float_outputs(run, walker.model, samples)
    with run.step("evaluate", "Measuring quality", *steps) as advance, offloading(run, walker) as offload:
        quality = measure_stages(walker.model, samples, size, advance, walker.residency, offload, known)
    tell_float_outputs(run, known)
    for stage, metrics in quality.stages.items():
        run.tracker.metrics({f"{stage}/{name}": value for name, value in metrics.items() if name != "tokens"})
    run.tracker.curves(quality.curves)
    return quality


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
        if processes.local_rank >= (found := torch.cuda.device_count()):
            raise ModelError(
                f"process {processes.local_rank} of this machine has no GPU to itself: there are {found}; "
                "start as many as there are, or say runtime.device=cpu"
            )
        name = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(name)
    return torch.device(name)
