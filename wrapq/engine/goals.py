"""What a run reached, and whether that is what its recipe asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wrapq.engine.measure import FLOAT, QUANTIZED
from wrapq.recipe.schema import Goals

AT_LEAST = ("top1_agreement",)
"""The figures of which more is better."""
SHARES = ("perplexity_increase", "top1_agreement")
"""The figures that are shown in percent."""
SECONDS = "seconds"


@dataclass(frozen=True)
class Verdict:
    """One goal after the run: the bound that was set, the value reached (None where there is none), and whether it is
    met.
    """

    bound: float
    value: float | None
    met: bool

    def excess(self) -> float:
        """By how much the goal is missed; negative or zero when it is met."""
        return 1e9 if self.value is None else abs(self.value - self.bound) * (-1 if self.met else 1)


def figures(
    stages: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
    seconds: Mapping[str, float],
    bits_per_weight: float | None,
) -> dict[str, float]:
    """The figures that goals may bound and sweeps compare, under the names of `Goals`."""
    reached = stages[QUANTIZED]
    found = {
        "perplexity": reached["perplexity"],
        "perplexity_increase": reached["perplexity"] / stages[FLOAT]["perplexity"] - 1,
        "kl": reached["kl"],
        "top1_agreement": reached["top1_agreement"],
        "size_mb": sizes[QUANTIZED] / 1e6,
        SECONDS: seconds["total"],
    }
    return found if bits_per_weight is None else found | {"bits_per_weight": bits_per_weight}


def judge(goals: Goals, reached: Mapping[str, float]) -> dict[str, Verdict]:
    """The verdict on every goal that is set; a figure that the run does not have meets none."""
    verdicts = {}
    for name, bound in goals.bounds().items():
        value = reached.get(name)
        met = value is not None and (value >= bound if name in AT_LEAST else value <= bound)
        verdicts[name] = Verdict(bound, value, met)
    return verdicts


def all_met(verdicts: Mapping[str, Verdict]) -> bool:
    """Whether no goal is missed."""
    return all(verdict.met for verdict in verdicts.values())
