"""Whether what a run reached is what its recipe asked for, and whether the model survived it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wrapq.metrics import metric

if TYPE_CHECKING:
    from wrapq.recipe.schema import Goals

COLLAPSED = "collapsed"
SURVIVAL = {"top1_agreement": 0.5, "perplexity_increase": 4.0}
"""What every quantized model has to reach: short of that it predicts other words more often than the same, or is five
times as unsure as the float model. A goal on one of these figures stands in its place, and so may allow less."""


@dataclass(frozen=True)
class GoalVerdict:
    """One goal after the run: the bound that was set, the value reached (None where there is none), whether it is met,
    and whether it is no goal of the recipe but one of `SURVIVAL`, which are listed only when they are missed."""

    bound: float
    value: float | None
    met: bool
    survival: bool = False

    def excess(self) -> float:
        """By how much the goal is missed; negative or zero when it is met."""
        return 1e9 if self.value is None else abs(self.value - self.bound) * (-1 if self.met else 1)


def judge(goals: Goals, reached: Mapping[str, float]) -> dict[str, GoalVerdict]:
    """The verdict on every goal that is set, which a figure that the run does not have misses, and on what the model
    lacks to have survived."""
    bounds = goals.bounds()
    verdicts = {name: _verdict(name, bound, reached.get(name)) for name, bound in bounds.items()}
    return verdicts | {name: verdict for name, verdict in lost(reached).items() if name not in bounds}


def lost(reached: Mapping[str, float]) -> dict[str, GoalVerdict]:
    """What of `SURVIVAL` a model with these figures misses; nothing of a figure that there is not."""
    there = {name: bound for name, bound in SURVIVAL.items() if name in reached}
    verdicts = {name: _verdict(name, bound, reached[name], survival=True) for name, bound in there.items()}
    return {name: verdict for name, verdict in verdicts.items() if not verdict.met}


def _verdict(name: str, bound: float, value: float | None, survival: bool = False) -> GoalVerdict:
    met = value is not None and (value >= bound if metric(name).higher else value <= bound)
    return GoalVerdict(bound, value, met, survival)


def all_met(verdicts: Mapping[str, GoalVerdict]) -> bool:
    """Whether no goal is missed."""
    return all(verdict.met for verdict in verdicts.values())


def collapsed(verdicts: Mapping[str, GoalVerdict]) -> bool:
    """Whether the model did not survive, which no goal allowed."""
    return any(verdict.survival for verdict in verdicts.values())
