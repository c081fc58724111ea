"""The launcher contract: how the jobs of a sweep are run, and the registry of the ways."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from wrapq.errors import ProblemsError
from wrapq.registry import Configurable, Place, Registry, build
from wrapq.sweep.job import FAILED, Job, Outcome, SweepError

if TYPE_CHECKING:
    from wrapq.recipe.schema import LauncherSettings

Work = Callable[[Job], Outcome]
LAUNCHERS: Registry[type[Launcher]] = Registry("launcher", "wrapq.sweep.launchers")


class Launcher(Configurable, ABC):
    """Runs jobs, some at a time, in processes of its own or not.

    A subclass registers itself:

        @LAUNCHERS.register("joblib")
        class Joblib(Launcher): ...

    Attributes:
        folder: the sweep's, for files of its own.
        shares_machine: whether the jobs that run at a time share this machine's cores.
        starts_processes: whether jobs run in processes that the launcher starts.
    """

    folder = Path()
    shares_machine = True
    starts_processes: ClassVar[bool] = True

    def check(self) -> None:
        """Refuse early what cannot work here; raises `WrapqError`."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of jobs that run at a time."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Run all jobs and yield each outcome as it arrives; closing the generator ends the jobs that still run.

        `work` never raises but on Ctrl-C; a job whose process dies has failed (`lost`) and takes no other with it.
        """


def make_launcher(config: LauncherSettings) -> Launcher:
    """The launcher that the settings ask for; raises `SweepError` or, for a missing package, `WrapqError`."""
    try:
        launcher = build(LAUNCHERS, config.kind, config.options, Place("launcher", "kind", owner="launcher {}"))
    except ProblemsError as error:
        raise SweepError(error.problems) from None
    launcher.check()
    return launcher


def lost(job: Job, reason: str) -> Outcome:
    """The outcome of a job whose process died."""
    return Outcome(job.key, FAILED, reason=reason)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
