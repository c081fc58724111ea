"""One job of a sweep: what it is, how it is done wherever a launcher takes it, and what comes out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wrapq.engine.context import Label
from wrapq.engine.earlier import find_equal, read_status
from wrapq.engine.folder import RunFolder
from wrapq.engine.goals import Verdict, figures, judge
from wrapq.engine.progress import Progress
from wrapq.engine.record import record_goals
from wrapq.engine.resume import STATE, ChangedError
from wrapq.engine.run import execute, use_machine
from wrapq.errors import WrapqError
from wrapq.recipe.schema import Settings
from wrapq.resolve.plan import Plan
from wrapq.sweep.together import specs_in_common
from wrapq.tracking import make_tracker
from wrapq.tracking.outbox import PARENT

RUNNING, FINISHED, REUSED, FAILED = "running", "finished", "reused", "failed"
DONE = (FINISHED, REUSED)


@dataclass(frozen=True)
class Job:
    """One job, resolved.

    Attributes:
        number: its place in the sweep, from 1.
        values: what varies, by the key of the override.
        plan: what is run.
        settings: on which machine and how.
        later: the plans of jobs that come after this one, for which it does what they have in common.
    """

    number: int
    values: Mapping[str, str]
    plan: Plan
    settings: Settings
    later: tuple[Plan, ...] = ()

    @property
    def title(self) -> str:
        """What tells the job from the others: `recipe=w8a16 seed=1`."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or self.plan.recipe.name

    @property
    def key(self) -> str:
        """SHA-256, in hex, of what the job does and on which kind of machine: equal for jobs that do the same."""
        said = [self.plan.digest(), self.settings.runtime.model_dump()]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        key: the job's.
        status: finished; reused, when an earlier run had done the same; failed; running, while nobody knows.
        folder: the run's.
        run_id: its MLflow run.
        figures: what it reached, by the names of `Goals`.
        goals: the verdicts on its goals.
        digest: of the quantized model's outputs.
        reason: why it failed.
    """

    key: str
    status: str
    folder: str = ""
    run_id: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, Verdict] = field(default_factory=dict)
    digest: str = ""
    reason: str = ""

    def to_json(self) -> str:
        """The outcome as JSON, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The outcome that `to_json` wrote; raises `ValueError` when `text` is none."""
        said = json.loads(text)
        if not isinstance(said, dict) or not {"key", "status"} <= said.keys():
            raise ValueError("no outcome of a job")
        said["goals"] = {name: Verdict(**verdict) for name, verdict in said.get("goals", {}).items()}
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in said.items() if name in known})


@dataclass(frozen=True)
class Workplace:
    """What every job of a sweep is told.

    Attributes:
        folder: the sweep's, absolute.
        cwd: the working directory, from which a recipe's relative paths are meant.
        parent: the sweep's MLflow run.
        tags: tags of every job's MLflow run.
    """

    folder: Path
    cwd: Path
    parent: str | None
    tags: Mapping[str, str]

    def outcome(self, key: str) -> Outcome | None:
        """What is written down of a job; None when it was never begun."""
        try:
            return Outcome.from_json(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, outcome: Outcome) -> Outcome:
        """Write down what became of a job, whole."""
        path = self._path(outcome.key)
        path.parent.mkdir(exist_ok=True)
        RunFolder(path.parent).write_text(path.name, outcome.to_json() + "\n")
        return outcome

    def _path(self, key: str) -> Path:
        return self.folder / "jobs" / f"{key[:16]}.json"


def do_job(job: Job, place: Workplace) -> Outcome:
    """Do a job, unless an earlier run did the same; whatever goes wrong with it is its outcome, not an error.

    Runs in any process on any machine that sees the sweep's folder. Ctrl-C alone goes through.
    """
    os.chdir(place.cwd)
    try:
        outcome = _reuse(job, place) or _run(job, place)
    except Exception as error:
        reason = str(error) if isinstance(error, WrapqError) else f"{type(error).__name__}: {error}"
        begun = place.outcome(job.key) or Outcome(job.key, RUNNING)
        outcome = replace(begun, status=FAILED, reason=reason)
    return place.write(outcome)


def _run(job: Job, place: Workplace) -> Outcome:
    plan, settings = job.plan, job.settings
    begun = place.outcome(job.key)
    if begun is not None and (Path(begun.folder) / "resume" / STATE).is_file():
        try:
            return _execute(job, place, RunFolder(Path(begun.folder)))
        except ChangedError:
            pass  # what was kept is of no use: the job begins anew
    folder = RunFolder.create(Path(settings.paths.outputs), plan.recipe.name, plan.estimate.quantized_bytes)
    place.write(Outcome(job.key, RUNNING, str(folder.path)))
    return _execute(job, place, folder)


def _execute(job: Job, place: Workplace, folder: RunFolder) -> Outcome:
    others = specs_in_common(job.plan, job.later)
    result = execute(job.plan, job.settings, Progress(), folder=folder, label=_label(job, place), others=others)
    if result is None:
        raise WrapqError("a job is one process; torchrun is for wrapq run")
    digest = result.digests["outputs"]
    return Outcome(job.key, FINISHED, str(result.folder), result.run_id, result.figures, result.goals, digest)


def _reuse(job: Job, place: Workplace) -> Outcome | None:
    """The outcome of an earlier run under the same lock."""
    plan, runtime = job.plan, job.settings.runtime
    device = use_machine(job.settings, plan.recipe.seed)
    folder = find_equal(Path(job.settings.paths.outputs), plan, device, runtime.trust_remote_code)
    if folder is None:
        return None
    before = place.outcome(job.key)
    if before is not None and before.status in DONE and before.folder == str(folder):
        return before
    status = read_status(folder)
    reached = figures(status["stages"], status["sizes"], status["seconds"], plan.estimate.bits_per_weight)
    outcome = Outcome(job.key, REUSED, str(folder), None, reached, {}, status["digests"]["outputs"])
    if before is not None and before.status == RUNNING and before.folder == str(folder):
        outcome = replace(outcome, status=FINISHED)  # the job's own run, which ended just before its process did
    return _record_reuse(job, place, replace(outcome, goals=judge(plan.recipe.goals, reached)))


def _record_reuse(job: Job, place: Workplace, outcome: Outcome) -> Outcome:
    """A child of the sweep's MLflow run that stands for a run made elsewhere."""
    label, folder = _label(job, place), place.folder / "reused" / job.key[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with make_tracker(job.settings) as tracker:
        tags = {**label.tags, "recipe": job.plan.recipe.name, "reused": outcome.folder, "folder": outcome.folder}
        tracker.start(label.name, tags, job.plan.recipe.model_dump(), folder)
        tracker.metrics({_METRICS.get(name, name): value for name, value in outcome.figures.items()})
        record_goals(tracker, outcome.goals)
        return replace(outcome, run_id=tracker.run_id)


_METRICS = {
    "perplexity": "quantized/perplexity",
    "kl": "quantized/kl",
    "top1_agreement": "quantized/top1_agreement",
    "size_mb": "size/quantized_mb",
    "seconds": "seconds/total",
}
"""What a run's metrics are called in MLflow, where that is not the figure's name."""


def _label(job: Job, place: Workplace) -> Label:
    tags: dict[str, Any] = {f"sweep.{key.lstrip('+')}": value for key, value in job.values.items()}
    parent = {PARENT: place.parent} if place.parent else {}
    return Label(job.title, {**place.tags, **tags, **parent, "sweep_job": str(job.number)})
