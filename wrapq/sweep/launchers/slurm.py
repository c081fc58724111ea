"""A Slurm job for each job, by submitit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from wrapq.errors import WrapqError
from wrapq.registry import Options, require
from wrapq.sweep.job import Job, Outcome
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, Work, lost

_POLL_SECONDS = 0.5


class SlurmOptions(Options):
    """`cluster`: slurm, or local for processes on this machine; `jobs`: submitted at a time; `options`: what
    submitit's `update_parameters` takes, such as `timeout_min`, `mem_gb`, `slurm_partition`.
    """

    cluster: Literal["slurm", "local"] = "slurm"
    jobs: Annotated[int, Field(ge=1)] = 16
    options: dict[str, Any] = {}


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """submitit's executor. The sweep's folder must lie where all nodes see it."""

    Options = SlurmOptions
    options: SlurmOptions

    def check(self) -> None:
        require("submitit", "slurm")

    @property
    def width(self) -> int:
        return self.options.jobs

    @property
    def shares_machine(self) -> bool:  # type: ignore[override]
        """Whether the jobs share this machine's cores."""
        return self.options.cluster == "local"

    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        import submitit

        try:
            executor = submitit.AutoExecutor(self.folder / "slurm", cluster=self.options.cluster)
            executor.update_parameters(**self.options.options)
        except Exception as error:  # submitit has no errors of its own for this
            raise WrapqError(f"submitit takes no jobs here: {type(error).__name__}: {error}") from error
        waiting, running = list(jobs), list[tuple[Job, Any]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.width:
                    job = waiting.pop(0)
                    running.append((job, executor.submit(work, job)))
                ended = [(job, task) for job, task in running if task.done()]
                running = [pair for pair in running if pair not in ended]
                yield from (_outcome(job, task) for job, task in ended)
                if not ended:
                    time.sleep(_POLL_SECONDS)
        finally:
            for _, task in running:
                with contextlib.suppress(Exception):  # it may have ended by itself
                    task.cancel()


def _outcome(job: Job, task: Any) -> Outcome:
    try:
        return task.result()
    except Exception as error:  # of the cluster, not of the job, which catches its own
        return lost(job, f"Slurm job {task.job_id} ended without a result: {str(error).splitlines()[0]}")
