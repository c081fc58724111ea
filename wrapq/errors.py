"""The errors wrapq raises on purpose.

Every one of them is a `WrapqError`: the command line prints it as one screen without a traceback and exits with the
class's `exit_code`. A message says where, what, with which value, and what would have been right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class WrapqError(Exception):
    """Base of every error whose cause is the user's input or surroundings, not a defect of wrapq."""

    exit_code = 2  # 1 is a command's answer: it differs, a goal was missed


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe or plan.

    Attributes:
        where: the file and line or the override that set the value, then the dotted path of the key.
        what: what is wrong, with the value.
        nearest: valid names, nearest first.
        remedy: what to do, when the nearest names do not say it.
    """

    where: str
    what: str
    nearest: tuple[str, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.nearest:
            lines.append(f"    did you mean: {', '.join(self.nearest)}")
        if self.remedy:
            lines.append(f"    {self.remedy}")
        return "\n".join(lines)


_SHOWN = 50  # of all the mistakes of one kind
ALIKE = 0.5  # from what likeness on a name may have been meant


@dataclass(frozen=True)
class Unread(Problem):
    """A key that is right and that nothing in this recipe reads."""


class ProblemsError(WrapqError):
    """All the mistakes of one kind, raised together."""

    exit_code = 2
    title = "problem"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} {self.title}{'s' if count != 1 else ''}:"
        more = [f"  - and {count - _SHOWN} more"] if count > _SHOWN else []
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems[:_SHOWN]), *more]))


class RecipeError(ProblemsError):
    """The recipe does not compose, does not fit the schema, or names something no registry holds."""

    title = "mistake in the recipe"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.args = (str(self).replace("mistake in the recipes", "mistakes in the recipe", 1),)


class PlanError(ProblemsError):
    """The recipe does not fit the model, or asks for something that cannot work."""

    title = "problem in the plan"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.args = (str(self).replace("problem in the plans", "problems in the plan", 1),)


class SpecError(WrapqError, ValueError):
    """A quantization spec that cannot be parsed or that contradicts itself."""

    exit_code = 2


class UnknownNameError(WrapqError, KeyError):
    """A name that a registry does not hold."""

    exit_code = 2

    def __init__(self, kind: str, name: str, names: Iterable[str]) -> None:
        self.kind, self.name, self.names = kind, name, tuple(names)
        self.nearest = nearest(name, self.names)
        super().__init__(f"unknown {kind} {name!r}; did you mean: {', '.join(self.nearest)}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr


class LifecycleError(WrapqError):
    """A wrapper asked to do what its state does not allow, such as converting a point that saw no data."""


class CalibrationError(WrapqError):
    """Calibration data or statistics that cannot be used: empty, NaN, inf."""

    exit_code = 3


class ModelError(WrapqError):
    """A model, checkpoint or run folder that cannot be read or is not what it says."""

    exit_code = 4


class OutputError(WrapqError):
    """A folder that cannot be written, or a disk that is full."""

    exit_code = 5


def nearest(name: str, names: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The valid names most like `name`, best first; the first few of all when none is alike."""
    names = tuple(dict.fromkeys(names))
    scored = [(likeness(name, other), other) for other in names]
    close = sorted((s for s in scored if s[0][0] >= ALIKE), reverse=True)
    return tuple(other for _, other in close[:count]) or names[: max(count, 8)]


def likeness(name: str, other: str) -> tuple[float, float]:
    """How much two names are alike, from 0 to 1: at most, and as a whole. The first counts only as many words of
    `other` as `name` has, where that is more: `w4a61` is `w4a16_gptq` with an end missing rather than `w8a16`."""
    name, other = name.lower(), other.lower()
    start = "_".join(other.split("_")[: name.count("_") + 1])
    whole, begun = (difflib.SequenceMatcher(None, text, name).ratio() for text in (other, start))
    return max(whole, begun), whole
