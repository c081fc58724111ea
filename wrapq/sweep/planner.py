"""From the values of an axis to jobs: every one composed and resolved before the first is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from wrapq.calibration.processes import Processes
from wrapq.engine.kernels import check_kernels
from wrapq.engine.streaming_checkpoint import check_streaming
from wrapq.errors import Problem, ProblemsError, RecipeError, Unread
from wrapq.recipe.axes import Axes
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Settings
from wrapq.resolve.resolve import resolve
from wrapq.sweep.job import Job, SweepError
from wrapq.sweep.launchers.base import cores

_SHOWN = 6  # job numbers listed for one mistake


class Planner:
    """Makes the jobs of a sweep.

    Args:
        axes: what varies.
        extra_dirs: folders with presets of one's own.
    """

    def __init__(self, axes: Axes, extra_dirs: Sequence[Path]) -> None:
        self.axes, self.extra_dirs = axes, extra_dirs
        self.threads: int | None = None
        self._optional: set[str] = set()
        self._jobs: dict[tuple[str, ...], Job] = {}

    def settings(self) -> Settings:
        """The settings of the sweep itself, which no job changes; raises `SweepError` when no job composes."""
        for values in self.axes.cover():
            try:
                return compose(self.axes.overrides(values), self.extra_dirs).settings
            except RecipeError:
                continue
        self.jobs(self.axes.cover())  # says what is wrong with all of them
        raise SweepError([])

    def share_cores(self, jobs: int) -> None:
        """Share out the cores of this machine among `jobs` at a time, where the settings name no number of threads."""
        self.threads = max(1, cores() // jobs) if jobs > 1 else None

    def jobs(self, values: Iterable[Mapping[str, str]], first: int = 1) -> list[Job]:
        """The jobs with `values`, numbered from `first`.

        Raises:
            SweepError: with every mistake of every job, each once with the jobs that have it.
            ModelError: the model's configuration cannot be read.
        """
        found: dict[int, Job] = {}
        refused: dict[int, ProblemsError] = {}
        idle: dict[int, tuple[Mapping[str, str], ProblemsError, set[str]]] = {}
        for number, chosen in enumerate(values, first):
            try:
                found[number] = self._job(number, dict(chosen))
            except ProblemsError as error:
                unread = [problem.override for problem in error.problems if isinstance(problem, Unread)]
                if len(unread) == len(error.problems) and set(unread) <= set(self.axes.fixed):
                    idle[number] = chosen, error, set(unread)
                else:
                    refused[number] = error
        if found:  # what one recipe of the sweep reads, the others may leave
            self._optional |= {text for _, _, texts in idle.values() for text in texts}
        for number, (chosen, why, texts) in idle.items():
            if texts <= self._optional:
                found[number] = self._job(number, dict(chosen), texts)
            else:
                refused[number] = why
        if refused:
            numbers: dict[Problem, list[int]] = {}
            for number, why in refused.items():
                for problem in why.problems:
                    numbers.setdefault(problem, []).append(number)
            count = len(found) + len(refused)
            raise SweepError([_named(problem, having, count) for problem, having in numbers.items()])
        return [found[number] for number in sorted(found)]

    def _job(self, number: int, values: dict[str, str], without: Set[str] = frozenset()) -> Job:
        overrides = self.axes.overrides(values)
        if overrides not in self._jobs:
            composed = compose([text for text in overrides if text not in without], self.extra_dirs)
            settings = composed.settings
            if settings.runtime.threads is None and self.threads is not None:
                runtime = settings.runtime.model_copy(update={"threads": self.threads})
                settings = settings.model_copy(update={"runtime": runtime})
            plan = resolve(composed.recipe, composed.sources, settings.runtime.trust_remote_code)
            check_streaming(plan, settings, Processes.from_environment())
            check_kernels(settings.runtime.kernels)
            self._jobs[overrides] = Job(number, values, plan, settings)
        return replace(self._jobs[overrides], number=number, values=values)


def _named(problem: Problem, numbers: Sequence[int], count: int) -> Problem:
    if count == 1:
        return problem
    listed = ", ".join(map(str, numbers[:_SHOWN])) + (" ..." if len(numbers) > _SHOWN else "")
    who = f"all {count} jobs" if len(numbers) == count else f"job{'s' if len(numbers) > 1 else ''} {listed} of {count}"
    return replace(problem, source=": ".join(filter(None, (who, problem.source))))
