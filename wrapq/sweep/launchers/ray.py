"""Tasks of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Annotated, Any

from pydantic import Field

from wrapq.errors import WrapqError
from wrapq.registry import Options, require
from wrapq.sweep.job import Job, Outcome
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, Work, cores, lost


class RayOptions(Options):
    """`address`: of a cluster, or `auto`; `jobs`: at a time; `cpus` and `gpus`: what each job is given."""

    address: str | None = None
    jobs: Annotated[int, Field(ge=1)] | None = None
    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0


@LAUNCHERS.register("ray")
class Ray(Launcher):
    """A task for each job, on a cluster that runs or on one of this machine's cores that is started and ended here."""

    Options = RayOptions
    options: RayOptions

    def check(self) -> None:
        require("ray", "ray")

    @property
    def width(self) -> int:
        return self.options.jobs or max(1, int(cores() / self.options.cpus))

    @property
    def shares_machine(self) -> bool:  # type: ignore[override]
        """Whether the jobs share this machine's cores."""
        return self.options.address is None

    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        import ray

        options = self.options
        own: dict[str, Any] = {"num_cpus": self.width * options.cpus, "include_dashboard": False}
        try:
            ray.init(
                options.address, logging_level=logging.ERROR, log_to_driver=False, **({} if options.address else own)
            )
        except Exception as error:  # a plain Exception when its own processes do not come up in time
            ray.shutdown()
            raise WrapqError(f"Ray cannot be reached or started here: {str(error).splitlines()[0]}") from error
        try:
            task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0)(_call)
            waiting, running = list(jobs), dict[Any, Job]()
            while waiting or running:
                while waiting and len(running) < self.width:
                    job = waiting.pop(0)
                    running[task.remote(work, job)] = job
                (ended,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(ended)
                try:
                    outcome = ray.get(ended)
                except ray.exceptions.RayError as error:  # of the cluster, not of the job, which catches its own
                    reason = str(error).splitlines()[0]
                    outcome = lost(job, f"its process died, perhaps for want of memory: {reason}")
                yield outcome
        finally:
            ray.shutdown()  # ends what still runs


def _call(work: Work, job: Job) -> Outcome:
    return work(job)
