"""A sweep: from overrides with several values to a table with a winner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wrapq.calibration.processes import Processes
from wrapq.engine.host import find_device
from wrapq.engine.run_data import input_digests
from wrapq.errors import Problem, WrapqError, unknown
from wrapq.export.base import EXPORTERS
from wrapq.metrics import metric, metrics
from wrapq.recipe.axes import Axes, parse_axes
from wrapq.recipe.schema import Settings
from wrapq.runs.lock import code_digest, environment
from wrapq.runs.run_record import find_equal
from wrapq.sweep.job import DONE, FAILED, Job, Outcome, SweepError
from wrapq.sweep.launchers.base import Launcher, make_launcher
from wrapq.sweep.planner import Planner
from wrapq.sweep.run_job import Workplace, do_job, do_job_in_new_process
from wrapq.sweep.samplers.base import Sampler, Suggestion, make_sampler
from wrapq.sweep.sweep_record import INTERRUPTED, SweepRecord
from wrapq.sweep.table import SweepRow, SweepTable, make_table
from wrapq.tracking.mlflow import make_tracker
from wrapq.tracking.outbox import SWEEP
from wrapq.tracking.process import one_process


class SweepProgress:
    """Says nothing; the base of those that do."""

    @contextmanager
    def jobs(self, total: int) -> Iterator[None]:
        """All the jobs."""
        yield

    def begun(self, folder: Path, continued: bool) -> None:
        """The sweep has its folder."""

    def ended(self, row: SweepRow, total: int) -> None:
        """A job ended, one of `total`."""

    def interrupted(self, done: int, total: int) -> None:
        """The sweep stops early."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        folder: its record.
        table: all jobs, judged.
        run_id: its MLflow run, or None.
        run_url: its page, where a server shows it.
        problems: what could not be recorded.
    """

    folder: Path
    table: SweepTable
    run_id: str | None
    run_url: str | None
    problems: tuple[str, ...] = ()


def sweep(
    overrides: Sequence[str], extra_dirs: Sequence[Path] = (), progress: SweepProgress | None = None
) -> SweepResult:
    """Do all the jobs that `overrides` give, and compare them; what `wrapq sweep` does.

    A job that fails does not stop the others. A sweep that was interrupted goes on when it is started again, and a job
    whose result an earlier run under the same outputs folder has, under the same lock, is not done again.

    Raises:
        RecipeError, SweepError: before anything is run, with the mistakes of all jobs.
        WrapqError: a launcher, sampler, folder or tracking store that cannot be used here.
    """
    if Processes.from_environment().count > 1:
        raise WrapqError("a sweep is started by one process, not under torchrun; launcher=... runs jobs side by side")
    axes = parse_axes(overrides, extra_dirs)
    planner = Planner(axes, extra_dirs)
    settings = planner.settings()
    launcher, sampler = make_launcher(settings.launcher), _make_sampler(settings, axes)
    if launcher.shares_machine:
        find_device(settings)  # a device that is not there is found at once
        planner.share_cores(min(launcher.width, sampler.total))
    planned = planner.jobs(sampler.preview())
    _check_exports(sampler.minimize, planned)
    with one_process(), make_tracker(settings) as tracker:
        record = SweepRecord.open(settings, _facts(overrides, settings, sampler, planned), tracker)
        return _RunningSweep(record, planner, sampler, launcher, progress or SweepProgress()).run()


class _RunningSweep:
    """A sweep with its record, planner, sampler and launcher."""

    def __init__(
        self, record: SweepRecord, planner: Planner, sampler: Sampler, launcher: Launcher, progress: SweepProgress
    ) -> None:
        self.record, self.planner, self.sampler, self.launcher = record, planner, sampler, launcher
        self.progress, self.rows = progress, dict[int, SweepRow]()
        launcher.folder = record.folder.path.resolve()
        tags = {"sweep": record.facts["name"], SWEEP: str(launcher.folder)}
        self.place = Workplace(launcher.folder, Path.cwd(), record.tracker.run_id, tags)

    def run(self) -> SweepResult:
        record, tracker = self.record, self.record.tracker
        try:
            self.sampler.open(self.place.folder)
            self.progress.begun(record.folder.path, record.continued)
            with self.progress.jobs(self.sampler.total):
                for number, values, outcome in self.sampler.elsewhere():
                    self._ended(Suggestion(number, values), outcome)
                while suggestions := self.sampler.ask(self.launcher.width):
                    self._do(suggestions)
        except BaseException:
            record.close(self._table(), INTERRUPTED)
            self.progress.interrupted(sum(row.done for row in self.rows.values()), self.sampler.total)
            raise
        for number, values, outcome in self.sampler.elsewhere():
            self.rows.setdefault(number, SweepRow(number, values, outcome))
        table, run_id, url = self._table(), tracker.run_id, tracker.run_url
        record.close(table)
        return SweepResult(record.folder.path, table, run_id, url, tuple(tracker.problems))

    def _do(self, suggestions: Sequence[Suggestion]) -> None:
        """Do a batch; jobs that are the same are done once."""
        wanted: dict[str, list[tuple[Suggestion, Job]]] = {}
        for suggestion in suggestions:
            try:
                (job,) = self.planner.jobs([suggestion.values], suggestion.number)
            except WrapqError as error:  # a combination that a sampler thought of need not be possible
                self._told(suggestion, Outcome("", FAILED, reason=str(error)))
            else:
                wanted.setdefault(job.key, []).append((suggestion, job))
        with closing(self._outcomes([pairs[0][1] for pairs in wanted.values()])) as outcomes:
            for outcome in outcomes:
                for suggestion, _ in wanted[outcome.key]:
                    self._told(suggestion, self.place.write(outcome))

    def _outcomes(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """The outcomes that this sweep had when it was interrupted, then those of the launcher."""
        kept = {job.key: outcome for job in jobs if (outcome := self._kept(job)) is not None}
        yield from kept.values()
        if left := [job for job in jobs if job.key not in kept]:
            work = do_job_in_new_process if self.launcher.starts_processes else do_job
            with closing(self.launcher.run(partial(work, place=self.place), left)) as outcomes:
                yield from outcomes

    def _kept(self, job: Job) -> Outcome | None:
        """What the sweep wrote down of the job before, if it still holds for model and data as they are."""
        outcome = self.place.outcome(job.key) if self.record.continued else None
        if outcome is None or outcome.status not in DONE:
            return None
        inputs = partial(input_digests, job.plan, job.settings.runtime.trust_remote_code)
        return outcome if find_equal(Path(job.settings.paths.outputs), job.plan, None, inputs) else None

    def _told(self, suggestion: Suggestion, outcome: Outcome) -> None:
        self.sampler.tell(suggestion, outcome)
        self._ended(suggestion, outcome)

    def _ended(self, suggestion: Suggestion, outcome: Outcome) -> None:
        row = SweepRow(suggestion.number, suggestion.values, outcome)
        self.rows[row.number] = row
        self.progress.ended(row, self.sampler.total)

    def _table(self) -> SweepTable:
        return make_table((self.rows[number] for number in sorted(self.rows)), self.sampler.minimize)


def _make_sampler(settings: Settings, axes: Axes) -> Sampler:
    """The sampler, once it is known that what it shall minimize is there."""
    able = [row for row in metrics(EXPORTERS) if not row.higher]
    known, names = [row.name for row in able], settings.sweep.minimize or []
    names = [names] if isinstance(names, str) else names
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        problems = [unknown("", f"sweep.minimize={name}", "figure to minimize", name, known) for name in wrong]
        raise SweepError(
            problems
            or [Problem("", "sweep.minimize", "names nothing", tuple(row.name for row in able if not row.format))]
        )
    return make_sampler(settings.sweep, axes, names)


def _check_exports(minimize: Sequence[str], planned: Sequence[Job]) -> None:
    """Raise `SweepError` where what shall be minimized is of an export that no job makes: none could win."""
    made = {format for job in planned for format in job.plan.recipe.export}
    for row in map(metric, minimize):
        if planned and not row.reachable(made):
            what = f"is of the export to {row.format}" if row.format else "is of exports"
            remedy = f"sweep with export={row.format or 'FORMAT'}"
            raise SweepError([Problem("", f"sweep.minimize={row.name}", f"{what}, and no job makes one", (), remedy)])


def _facts(overrides: Sequence[str], settings: Settings, sampler: Sampler, planned: Sequence[Job]) -> dict[str, Any]:
    """What the record says of the sweep from the start; `identity` is equal for sweeps that do the same."""
    facts = {
        "axes": {axis.key: axis.describe() for axis in sampler.axes.axes},
        "sampler": settings.sweep.sampler,
        "options": settings.sweep.options,
        "minimize": list(sampler.minimize),
        "total": sampler.total,
    }
    decisive = [facts, sorted(job.key for job in planned), environment(), code_digest()]
    identity = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return {"name": settings.sweep.name, **facts, "overrides": list(overrides), "identity": identity}
