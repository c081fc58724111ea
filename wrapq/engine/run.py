"""A run: the execution of one plan, from data to a checked checkpoint, with its record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from wrapq.calibration.processes import Processes
from wrapq.calibration.walker import Walker
from wrapq.data.samples import Samples
from wrapq.engine.apply_transforms import transform
from wrapq.engine.calibrate import calibrate, calibrate_parts
from wrapq.engine.collapse import explain_collapse
from wrapq.engine.context import Run, RunOptions
from wrapq.engine.host import use_machine
from wrapq.engine.measure import measure_run
from wrapq.engine.preflight import check_machine
from wrapq.engine.progress import Progress
from wrapq.engine.record import RunResult, close_record, open_record, record_failure, tell_problems
from wrapq.engine.run_data import read_data
from wrapq.engine.save import save_and_export
from wrapq.engine.schedule_comparison import compare_schedules
from wrapq.errors import ModelError
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Settings
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runs.checkpoint import load_float
from wrapq.runs.folder import RunFolder
from wrapq.runs.resume import forget_progress
from wrapq.runs.run_record import RunRecord, find_unfinished
from wrapq.tracking.base import Tracker
from wrapq.tracking.mlflow import make_tracker
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
    return execute(plan, composed.settings, progress or Progress(), RunOptions(resume))


def execute(
    plan: Plan,
    settings: Settings,
    progress: Progress,
    options: RunOptions = RunOptions(),  # noqa: B008 - immutable
) -> RunResult | None:
    """Execute a plan and leave its folder and its tracked run.

    Under `torchrun` the processes share the calibration data; the first does all the rest and has the result, None is
    the others'.

    Whatever happens, the folder says how the run ended and the tracked run is closed; files are whole or absent.

    Raises:
        OutputError: the outputs folder cannot be written, its disk is full, another process is at the run.
        CalibrationError, ModelError, LifecycleError: from the data, the model, a point that no data reached.
    """
    processes = Processes.from_environment()
    check_machine(plan, settings, processes)
    with use_machine(settings, plan.recipe.seed, processes) as device, processes.joined(device):
        if processes.rank:  # it calibrates on its share of the data
            folder = RunFolder(Path(processes.text_of_first("")))
            run = Run(plan, settings, folder, Tracker(), Progress(), device, processes)
            calibration, evaluation = read_data(run)
            _calibrate(run, calibration)
            compare_schedules(run, calibration, evaluation, None)
            return None
        folder = options.folder or _folder(plan, settings, options.resume)
        with folder.own(), folder.log():
            if options.resume and not RunRecord(folder.path).resumable:  # another process was faster
                forget_progress(folder)
                raise ModelError(f"nothing to resume: {folder.path} has ended meanwhile")
            processes.text_of_first(str(folder.path))
            folder.sweep()  # of what a process that was killed left half written
            tracker = options.tracker or make_tracker(settings)
            run = Run(plan, settings, folder, tracker, progress, device, processes, options)
            try:
                return _execute(run)
            except BaseException as error:
                record_failure(run, error)
                raise


def _folder(plan: Plan, settings: Settings, resume: bool) -> RunFolder:
    outputs, name, size = Path(settings.paths.outputs), plan.recipe.name, plan.estimate.quantized_bytes
    return RunFolder(find_unfinished(outputs, name).folder) if resume else RunFolder.create(outputs, name, size)


def _execute(run: Run) -> RunResult:
    start = time.perf_counter()
    open_record(run)
    with run.step("data", "Reading data"):
        calibration, evaluation = read_data(run)
        run.tracker.ready()  # opened beside the reading; a store that refuses the run must not cost a calibration
        tell_problems(run)
    walker = _calibrate(run, calibration)
    quality = measure_run(run, walker, evaluation)
    explain_collapse(run, walker, evaluation, quality)
    compare_schedules(run, calibration, evaluation, quality)
    exports = save_and_export(run, walker, evaluation, quality)
    run.seconds["total"] = time.perf_counter() - start
    return close_record(run, quality, exports)


def _calibrate(run: Run, calibration: Samples | None) -> Walker:
    source, specs = run.source, run.plan.specs()
    with run.step("load", "Loading the model"):
        model, weights = (
            source.open_blocks(run.device, specs) if run.streaming else (load_float(source, run.device), None)
        )
        run.digests["model"] = source.digest()
    transform(run, model, calibration)
    walker = calibrate(run, wrap_model(model, specs), calibration, weights)
    if run.plan.parts and not run.processes.rank:
        calibrate_parts(run, walker.model, calibration)
    return walker
