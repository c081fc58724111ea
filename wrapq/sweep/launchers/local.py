"""One job after another in the sweep's own process."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from wrapq.sweep.job import Job, Outcome
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, Work


@LAUNCHERS.register("local")
class Local(Launcher):
    """Nothing is started; a job that takes the process with it takes the sweep."""

    starts_processes = False

    @property
    def width(self) -> int:
        return 1

    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        for job in jobs:
            yield work(job)
