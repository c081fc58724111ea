"""Several processes on this machine, by joblib."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from typing import Annotated

from pydantic import Field

from wrapq.registry import Options, require
from wrapq.sweep.job import Job, Outcome
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, Work, cores, lost

_AT_LEAST = 2  # with one, joblib would run the job in this very process


class JoblibOptions(Options):
    """`jobs`: processes at a time; as many as there are cores when not given."""

    jobs: Annotated[int, Field(ge=1)] | None = None


@LAUNCHERS.register("joblib")
class Joblib(Launcher):
    """joblib's loky executor. When one of its processes dies, all that were under way are lost with it, so those are
    done again one by one: only the one that dies alone has failed.
    """

    Options = JoblibOptions
    options: JoblibOptions

    def check(self) -> None:
        require("joblib", "joblib")

    @property
    def width(self) -> int:
        return self.options.jobs or cores()

    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting = {job.key: job for job in jobs}
        try:
            for outcome in self._parallel(work, jobs, self.width):
                del waiting[outcome.key]
                yield outcome
            return
        except TerminatedWorkerError:
            pass
        for job in waiting.values():
            try:
                yield from self._parallel(work, [job], _AT_LEAST)
            except TerminatedWorkerError as error:
                yield lost(job, f"its process died, perhaps for want of memory: {str(error).splitlines()[0]}")

    @staticmethod
    def _parallel(work: Work, jobs: Sequence[Job], width: int) -> Generator[Outcome]:
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=width, return_as="generator_unordered")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that workers were ended on Ctrl-C is what was asked for
            yield from parallel(delayed(work)(job) for job in jobs)
