"""What a launcher is, and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from wrapq.recipe.schema import Launcher as Config
from wrapq.registry import Registry
from wrapq.sweep.jobs import FAILED, Job, Outcome
from wrapq.sweep.options import SweepOptions, check_options

Work = Callable[[Job], Outcome]
LAUNCHERS: Registry[type[Launcher]] = Registry("launcher", "wrapq.sweep.launchers")


class Launcher(ABC):
    """Runs jobs, some at a time, in processes of its own or not.

    A subclass declares its options as a nested `Options` and registers itself:

        @LAUNCHERS.register("joblib")
        class Joblib(Launcher): ...

    Attributes:
        options: the validated options.
        folder: the sweep's, for files of its own.
        shares_machine: whether the jobs that run at a time share this machine's cores.
    """

    Options: ClassVar[type[SweepOptions]] = SweepOptions
    shares_machine = True

    def __init__(self, options: SweepOptions) -> None:
        self.options: Any = options
        self.folder = Path()

    def check(self) -> None:  # noqa: B027 - most need nothing
        """Refuse early what cannot work here; raises `WrapqError`."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many jobs run at a time."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        """The outcomes, each as soon as it is there. What is still running is ended when the caller stops asking.

        `work` never raises but on Ctrl-C; a job whose process dies has failed (`lost`) and takes no other with it.
        """


def make_launcher(config: Config) -> Launcher:
    """The launcher that the settings ask for; raises `SweepError` or, for a missing package, `WrapqError`."""
    kind, options = check_options(LAUNCHERS, "launcher.kind", config.kind, config.options)
    launcher = kind(options)
    launcher.check()
    return launcher


def lost(job: Job, reason: str) -> Outcome:
    """The outcome of a job whose process died."""
    return Outcome(job.key, FAILED, reason=reason)
