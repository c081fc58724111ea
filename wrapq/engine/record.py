"""Recording a run: the status in its folder, its page, and the tracked run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wrapq.engine.context import Run
from wrapq.engine.export import Exported
from wrapq.engine.goals import COLLAPSED, GoalVerdict, all_met, collapsed, judge
from wrapq.engine.measure import Quality
from wrapq.engine.registered import MLMODEL, mlmodel
from wrapq.foreign import markdown
from wrapq.html.note import run_note
from wrapq.html.run_page import render_run
from wrapq.metrics import FLOAT, QUANTIZED, Measured, metric
from wrapq.recipe.dump import to_yaml
from wrapq.runs.checkpoint import weight_bytes
from wrapq.runs.folder import FAILED, FINISHED, MANIFEST, PLAN, RECIPE, RECORDED, REPORT, RUNNING, STATUS_FILE
from wrapq.runs.lock import device_class, environment
from wrapq.runs.resume import forget_progress
from wrapq.runs.run_record import RunRecord
from wrapq.tracking.base import Tracker

_MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja"}
_RECORDS = {*RECORDED, STATUS_FILE} - {MANIFEST}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run.

    Attributes:
        folder: where everything lies.
        metrics: for each stage (`float`, `weights`, `quantized`) its metrics.
        sizes: bytes of the float and of the quantized model.
        seconds: for each step of the run how long it took.
        digests: of model, data, plan, quantization parameters and outputs.
        notes: what a reader should know.
        run_id: the id of the MLflow run, or None.
        run_url: its page, where a server shows it.
        exports: the copies in other projects' formats that the recipe asks for, by format.
        goals: the verdict on every goal of the recipe.
        figures: what goals bound and sweeps compare, by the names of `wrapq.metrics`.
        kernels: which kernels run the model on this machine and how fast, in a line; `wrapq.load(..., runtime="auto")`.
    """

    folder: Path
    metrics: dict[str, dict[str, float]]
    sizes: dict[str, int]
    seconds: dict[str, float]
    digests: dict[str, str]
    notes: tuple[str, ...] = ()
    run_id: str | None = None
    run_url: str | None = None
    exports: dict[str, Exported] = field(default_factory=dict)
    kernels: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, GoalVerdict] = field(default_factory=dict)


def open_record(run: Run) -> None:
    """Record the run as running, before anything is loaded."""
    plan, recipe, before = run.plan, run.plan.recipe, RunRecord(run.folder.path)
    if before.resumable and not before.readable:
        run.note(f"{run.folder.path / STATUS_FILE} is damaged: it is written anew")
    run.folder.write_status(RUNNING, recipe=recipe.name)
    run.folder.write_text(RECIPE, to_yaml(recipe))
    run.folder.write_text(PLAN, plan.model_dump_json(indent=1) + "\n")
    run.digests |= {"recipe": recipe.digest(), "plan": plan.digest()}
    versions = {f"version.{name}": version for name, version in environment().items()}
    tags = {"recipe": recipe.name, "description": recipe.description, "folder": str(run.folder.path.resolve())}
    tags |= {**versions, "device": device_class(run.device), **_digest_tags(run), **run.options.tags}
    run.tracker.start(run.options.name or recipe.name, tags, recipe.model_dump(), run.folder.path, wait=False)


def tell_problems(run: Run) -> None:
    """Note each problem of the tracker."""
    for problem in run.tracker.problems:
        run.note_once(f"tracking: {problem}")


def close_record(run: Run, quality: Quality, exports: dict[str, Exported]) -> RunResult:
    """Record the run as finished; returns its result."""
    sizes = {FLOAT: run.plan.estimate.float_bytes, QUANTIZED: weight_bytes(run.folder.path)}
    copies = {name: export.figures for name, export in exports.items()}
    measured = Measured(quality.stages, sizes, run.seconds, run.plan.estimate.bits_per_weight, copies)
    reached = measured.figures()
    verdicts = judge(run.plan.recipe.goals, reached)
    shared: dict[str, Any] = {"sizes": sizes, "seconds": run.seconds, "digests": run.digests, "kernels": run.kernels}
    facts = {"recipe": run.plan.recipe.name, "stages": quality.stages, "curves": quality.curves, **shared}
    facts |= {"notes": run.notes, "run_id": run.tracker.run_id}
    if verdicts:
        facts["goals"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    if collapsed(verdicts):
        facts["verdict"] = COLLAPSED
    if exports:
        facts["exports"] = {
            name: {"path": str(export.path), "error": export.error, "figures": export.figures}
            for name, export in exports.items()
        }
    for name, export in exports.items():
        own = {"relative_error": export.error, **export.figures}
        run.tracker.metrics({f"export/{name}/{figure}": value for figure, value in own.items()})
    ended = RunRecord.ending(run.folder.path, {"status": FINISHED, **facts})
    run.folder.write_text(REPORT, render_run(ended))
    run.tracker.tags({**_digest_tags(run), "mlflow.note.content": run_note(run.plan, measured)})
    run.tracker.metrics({f"size/{stage}_mb": size / 1e6 for stage, size in sizes.items()})
    run.tracker.metrics({f"seconds/{step}": value for step, value in run.seconds.items()})
    run.tracker.metrics({name: value for name, value in reached.items() if metric(name).mlflow == name})
    record_goals(run.tracker, verdicts)
    for name in RECORDED:
        if (run.folder.path / name).exists():
            run.tracker.artifact(run.folder.path / name)
    if (entry := run.settings.tracking.register_as) is not None:
        run.folder.write_text(MLMODEL, mlmodel(run.source.vocab_size, {"recipe": run.plan.recipe.name, **run.digests}))
        for file in sorted(run.folder.path.iterdir()):
            if file.is_file() and (file.suffix in _MODEL_FILES or file.name == MLMODEL) and file.name not in _RECORDS:
                run.tracker.artifact(file, "model")
        figures = {f"{stage}.perplexity": f"{metrics['perplexity']:.4f}" for stage, metrics in quality.stages.items()}
        tags = {"recipe": run.plan.recipe.name, **figures, **_digest_tags(run)}
        alias = entry.alias
        if alias and collapsed(verdicts):
            run.note(f"collapsed: the alias {alias} of {entry.name} stays where it is")
            alias = None
        run.tracker.register(entry.name, alias, markdown(run.plan.recipe.description), tags)
    run.tracker.finish()
    tell_problems(run)
    run.folder.write_status(**ended.facts)  # last: a run that is killed before is taken up, and ends with all of it
    shared |= {"notes": tuple(run.notes), "run_id": run.tracker.run_id, "run_url": run.tracker.run_url}
    forget_progress(run.folder)
    return RunResult(run.folder.path, quality.stages, figures=reached, goals=verdicts, exports=exports, **shared)


def record_goals(tracker: Tracker, verdicts: Mapping[str, GoalVerdict]) -> None:
    """Tag the tracked run with its goals: `goals` is met, missed or collapsed, `goal.NAME` has value and bound."""
    if not verdicts:
        return
    words = {True: "met", False: "missed"}
    tags = {f"goal.{name}": f"{words[v.met]}: {v.value} of {v.bound}" for name, v in verdicts.items()}
    verdict = COLLAPSED if collapsed(verdicts) else words[all_met(verdicts)]
    tracker.tags({"goals": verdict, **tags})
    values = {f"goal/{name}": v.value for name, v in verdicts.items() if v.value is not None}
    tracker.metrics({**values, "goals_missed": sum(not v.met for v in verdicts.values())})


def record_failure(run: Run, error: BaseException) -> None:
    """Record the run as failed, with the reason."""
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    _log.error("failed: %s", reason)
    try:
        run.folder.write_status(FAILED, reason=reason)
        if (run.folder.path / PLAN).is_file():
            run.folder.write_text(REPORT, render_run(RunRecord(run.folder.path)))
            run.tracker.artifact(run.folder.path / REPORT)
    except Exception as second:  # a full disk may be the very reason; the first error is the one to show
        _log.error("the folder cannot say so: %s", second)
    run.tracker.finish(FAILED, reason)


def _digest_tags(run: Run) -> Mapping[str, str]:
    return {f"digest.{name}": digest for name, digest in run.digests.items()}
