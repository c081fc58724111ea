"""A job of a sweep and its outcome: the records that samplers and launchers see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from wrapq.engine.goals import GoalVerdict
from wrapq.errors import ProblemsError

if TYPE_CHECKING:
    from wrapq.recipe.schema import Settings
    from wrapq.resolve.plan import Plan

RUNNING, FINISHED, REUSED, FAILED = "running", "finished", "reused", "failed"
DONE = (FINISHED, REUSED)


class SweepError(ProblemsError):
    """Jobs of a sweep that cannot be done as they are asked for."""

    titles = ("problem in the sweep", "problems in the sweep")


@dataclass(frozen=True)
class Job:
    """One job, resolved.

    Attributes:
        number: the index in the sweep, from 1.
        values: of the axes, by the key of the override.
        plan: of the run.
        settings: of the machine.
    """

    number: int
    values: Mapping[str, str]
    plan: Plan
    settings: Settings

    @property
    def title(self) -> str:
        """The values of the axes: `recipe=w8a16 seed=1`."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or self.plan.recipe.name

    @property
    def key(self) -> str:
        """SHA-256, in hex, of plan and runtime settings: equal for jobs that do the same."""
        decisive = [self.plan.digest(), self.settings.runtime.model_dump()]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        key: the job's.
        status: finished; reused, when an earlier run did the same; failed; running, until it is known.
        folder: the run's.
        run_id: its MLflow run.
        figures: by the names of `wrapq.metrics`.
        goals: the verdicts on its goals.
        digest: of the quantized model's outputs.
        reason: why it failed.
    """

    key: str
    status: str
    folder: str = ""
    run_id: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, GoalVerdict] = field(default_factory=dict)
    digest: str = ""
    reason: str = ""

    def to_json(self) -> str:
        """The outcome as JSON, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """The outcome that `to_json` wrote; raises `ValueError` when `text` is none."""
        values = json.loads(text)
        if not isinstance(values, dict) or not {"key", "status"} <= values.keys():
            raise ValueError("no outcome of a job")
        values["goals"] = {name: GoalVerdict(**verdict) for name, verdict in values.get("goals", {}).items()}
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
