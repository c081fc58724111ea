"""Whether what a run reached is what its recipe asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wrapq.metrics import METRICS

if TYPE_CHECKING:
    from wrapq.recipe.schema import Goals


@dataclass(frozen=True)
class GoalVerdict:
    """One goal after the run: the bound that was set, the value reached (None where there is none), and whether it is
    met.
    """

    bound: float
    value: float | None
    met: bool

    def excess(self) -> float:
        """By how much the goal is missed; negative or zero when it is met."""
        return 1e9 if self.value is None else abs(self.value - self.bound) * (-1 if self.met else 1)


def judge(goals: Goals, reached: Mapping[str, float]) -> dict[str, GoalVerdict]:
    """The verdict on every goal that is set; a figure that the run does not have meets none."""
    verdicts = {}
    for name, bound in goals.bounds().items():
        value = reached.get(name)
        met = value is not None and (value >= bound if METRICS.get(name).higher else value <= bound)
        verdicts[name] = GoalVerdict(bound, value, met)
    return verdicts


def all_met(verdicts: Mapping[str, GoalVerdict]) -> bool:
    """Whether no goal is missed."""
    return all(verdict.met for verdict in verdicts.values())
