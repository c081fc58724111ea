"""Running one job of a sweep, in whatever process a launcher takes it to."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from wrapq.engine.context import RunOptions
from wrapq.engine.goals import judge
from wrapq.engine.host import use_machine
from wrapq.engine.progress import Progress
from wrapq.engine.record import record_goals
from wrapq.engine.run import execute
from wrapq.engine.run_data import input_digests
from wrapq.errors import WrapqError
from wrapq.large_pages import use_large_pages
from wrapq.metrics import metric
from wrapq.runs.folder import RunFolder, seal, unseal
from wrapq.runs.resume import ChangedError
from wrapq.runs.run_record import RunRecord, find_equal
from wrapq.sweep.job import DONE, FAILED, FINISHED, REUSED, RUNNING, Job, Outcome
from wrapq.tracking.mlflow import make_tracker
from wrapq.tracking.outbox import PARENT

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workplace:
    """What all jobs of a sweep share.

    Attributes:
        folder: the sweep's, absolute.
        cwd: the working directory, to which relative paths of a recipe refer.
        parent: the sweep's MLflow run.
        tags: tags of every job's MLflow run.
    """

    folder: Path
    cwd: Path
    parent: str | None
    tags: Mapping[str, str]

    def outcome(self, key: str) -> Outcome | None:
        """The recorded outcome of a job; None when it was never begun, or the record is damaged."""
        path = self._path(key)
        try:
            return Outcome.from_json(unseal(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                _log.warning("%s is damaged: the job is done again, unless a finished run is found", path)
            return None

    def write(self, outcome: Outcome) -> Outcome:
        """Record the outcome of a job, whole or not at all."""
        path = self._path(outcome.key)
        path.parent.mkdir(exist_ok=True)
        RunFolder(path.parent).write_text(path.name, seal(outcome.to_json()))
        return outcome

    def _path(self, key: str) -> Path:
        return self.folder / "jobs" / f"{key[:16]}.json"


def do_job(job: Job, place: Workplace) -> Outcome:
    """Do a job, unless an earlier run did the same; whatever goes wrong with it is its outcome, not an error.

    Runs in any process on any machine that sees the sweep's folder. Ctrl-C alone goes through.
    """
    try:
        outcome = _reuse(job, place) or _run(job, place)
    except Exception as error:
        reason = str(error) if isinstance(error, WrapqError) else f"{type(error).__name__}: {error}"
        outcome = replace(place.outcome(job.key) or Outcome(job.key, RUNNING), status=FAILED, reason=reason)
    return place.write(outcome)


def do_job_in_new_process(job: Job, place: Workplace) -> Outcome:
    """`do_job` in a process that a launcher started, in whatever folder, for nothing but jobs."""
    os.chdir(place.cwd)
    use_large_pages()
    return do_job(job, place)


def _run(job: Job, place: Workplace) -> Outcome:
    plan, settings = job.plan, job.settings
    begun = place.outcome(job.key)
    if begun is not None and RunRecord(Path(begun.folder)).resumable:
        try:
            return _execute(job, place, RunFolder(Path(begun.folder)))
        except ChangedError:
            pass  # what was kept is of no use: the job begins anew
    folder = RunFolder.create(Path(settings.paths.outputs), plan.recipe.name, plan.estimate.quantized_bytes)
    place.write(Outcome(job.key, RUNNING, str(folder.path)))
    return _execute(job, place, folder)


def _execute(job: Job, place: Workplace, folder: RunFolder) -> Outcome:
    if (done := execute(job.plan, job.settings, Progress(), _options(job, place, folder))) is None:
        raise WrapqError("a job is one process; torchrun is for wrapq run")
    digest = done.digests["outputs"]
    return Outcome(job.key, FINISHED, str(done.folder), done.run_id, done.figures, done.goals, digest)


def _reuse(job: Job, place: Workplace) -> Outcome | None:
    """The outcome of an earlier run under the same lock."""
    plan = job.plan
    inputs = partial(input_digests, plan, job.settings.runtime.trust_remote_code)
    with use_machine(job.settings, plan.recipe.seed) as device:
        run = find_equal(Path(job.settings.paths.outputs), plan, device, inputs)
    if run is None:
        return None
    folder, before = run.folder, place.outcome(job.key)
    if before is not None and before.status in DONE and before.folder == str(folder):
        return before
    outcome = Outcome(job.key, REUSED, str(folder), None, reached := run.figures, {}, run.digests["outputs"])
    if before is not None and before.status == RUNNING and before.folder == str(folder):
        outcome = replace(outcome, status=FINISHED)  # the job's own run, which ended just before its process did
    return _record_reuse(job, place, replace(outcome, goals=judge(plan.recipe.goals, reached)))


def _record_reuse(job: Job, place: Workplace, outcome: Outcome) -> Outcome:
    """A child of the sweep's MLflow run that stands for a run made elsewhere."""
    options, folder = _options(job, place), place.folder / "reused" / job.key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with make_tracker(job.settings) as tracker:
        tags = {**options.tags, "recipe": job.plan.recipe.name, "reused": outcome.folder, "folder": outcome.folder}
        tracker.start(options.name, tags, job.plan.recipe.model_dump(), folder)
        tracker.metrics({metric(name).mlflow: value for name, value in outcome.figures.items()})
        record_goals(tracker, outcome.goals)
        return replace(outcome, run_id=tracker.run_id)


def _options(job: Job, place: Workplace, folder: RunFolder | None = None) -> RunOptions:
    values = {f"sweep.{key.lstrip('+')}": value for key, value in job.values.items()}
    parent = {PARENT: place.parent} if place.parent else {}
    tags = {**values, **place.tags, **parent, "sweep_job": str(job.number)}
    return RunOptions(folder=folder, name=job.title, tags=tags)
