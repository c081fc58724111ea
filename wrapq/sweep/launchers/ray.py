"""Tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from wrapq.errors import WrapqError
from wrapq.sweep.jobs import Job, Outcome
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, Work, lost
from wrapq.sweep.options import SweepOptions, require
from wrapq.sweep.planner import cores


@LAUNCHERS.register("ray")
class Ray(Launcher):
    """A task for each job, on a cluster that runs or on one of this machine's cores that is started and ended here."""

    class Options(SweepOptions):
        """`address`: of a cluster, or `auto`; `jobs`: at a time; `cpus` and `gpus`: what each job is given."""

        address: str | None = None
        jobs: Annotated[int, Field(ge=1)] | None = None
        cpus: Annotated[float, Field(gt=0)] = 1
        gpus: Annotated[float, Field(ge=0)] = 0

    def check(self) -> None:
        require("ray", "ray")

    @property
    def width(self) -> int:
        return self.options.jobs or max(1, int(cores() / self.options.cpus))

    @property
    def shares_machine(self) -> bool:  # type: ignore[override]
        return self.options.address is None

    def run(self, work: Work, jobs: Sequence[Job]) -> Generator[Outcome]:
        import ray

        options = self.options
        with self._cluster():
            task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0)(_call)
            waiting, running = list(jobs), dict[Any, Job]()
            while waiting or running:
                while waiting and len(running) < self.width:
                    job = waiting.pop(0)
                    running[task.remote(work, job)] = job
                (ended,), _ = ray.wait(list(running), num_returns=1)
                yield _outcome(running.pop(ended), ended)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[None]:
        import ray

        own = {} if self.options.address else {"num_cpus": self.width * self.options.cpus, "include_dashboard": False}
        try:
            ray.init(self.options.address, logging_level=logging.ERROR, log_to_driver=False, **own)
        except Exception as error:  # a plain Exception when its own processes do not come up in time
            ray.shutdown()
            raise WrapqError(f"Ray cannot be reached or started here: {str(error).splitlines()[0]}") from error
        try:
            yield
        finally:
            ray.shutdown()  # ends what still runs


def _call(work: Work, job: Job) -> Outcome:
    return work(job)


def _outcome(job: Job, task: Any) -> Outcome:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:  # of the cluster, not of the job, which catches its own
        return lost(job, f"its process died, perhaps for want of memory: {str(error).splitlines()[0]}")
