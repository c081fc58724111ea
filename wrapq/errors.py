"""The errors wrapq raises on purpose.

Every one of them is a `WrapqError`: the command line prints it as one screen without a traceback and exits with the
class's `exit_code`. A message says where, what, with which value, and what would have been right.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class WrapqError(Exception):
    """Base of every error whose cause is the user's input or surroundings, not a defect of wrapq."""

    exit_code = 2  # 1 is a command's answer: it differs, a goal was missed


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, a plan or a sweep.

    Attributes:
        source: what set the value, `recipes/mine.yaml:12` or `override a.b=c`; empty when nothing in particular did.
        path: the dotted path of the key; empty when it is no key's.
        what: what is wrong, with the value.
        nearest: valid names, nearest first.
        remedy: what to do, when the nearest names do not say it.
    """

    source: str
    path: str
    what: str
    nearest: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def where(self) -> str:
        """The source and the path as a message shows them."""
        return ": ".join(filter(None, (self.source, self.path)))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.nearest:
            lines.append(f"    did you mean: {', '.join(self.nearest)}")
        if self.remedy:
            lines.append(f"    {self.remedy}")
        return "\n".join(lines)


_SHOWN = 50  # of all the mistakes of one kind
_REASON = 300
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "failed to map segment", "can't start new thread")
ALIKE = 0.5  # from what likeness on a name may have been meant


@dataclass(frozen=True)
class Unread(Problem):
    """A key that is right and that nothing in this recipe reads.

    Attributes:
        override: the override that sets it; empty when a file does.
    """

    override: str = ""


class ProblemsError(WrapqError):
    """All the mistakes of one kind, raised together.

    Attributes:
        problems: the mistakes.
        titles: what one is called, and what several are.
    """

    titles = ("problem", "problems")

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        more = [f"  - and {count - _SHOWN} more"] if count > _SHOWN else []
        lines = [f"{count} {self.titles[count != 1]}:", *(f"  - {p}" for p in self.problems[:_SHOWN]), *more]
        super().__init__("\n".join(lines))


class RecipeError(ProblemsError):
    """The recipe does not compose, does not fit the schema, or names something no registry holds."""

    titles = ("mistake in the recipe", "mistakes in the recipe")


class PlanError(ProblemsError):
    """The recipe does not fit the model, or asks for something that cannot work."""

    titles = ("problem in the plan", "problems in the plan")


class SpecError(WrapqError, ValueError):
    """A quantization spec that cannot be parsed or that contradicts itself."""


class UnknownNameError(WrapqError, KeyError):
    """A name that a registry does not hold."""

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


def reason_of(error: Exception) -> str:
    """Why a library cannot read something, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "validation error" in lines[0] and len(lines) > 2:  # as pydantic counts them: the first of them
        return f"{lines[1]}: {lines[2].partition(' [type=')[0]}"[:_REASON]
    reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # a heading alone says nothing
    return f"KeyError {reason}" if type(error) is KeyError else reason[:_REASON]


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def reading(failure: str, kind: type[WrapqError], why: Callable[[Exception], str] = reason_of) -> Iterator[None]:
    """Raise what a library raises in the block as a `kind`: `failure`, and `why`. The block hands the library data of
    the user's to read, and does nothing else: libraries raise anything on data that nobody thought of.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WrapqError) or out_of_memory(error):
            raise
        raise kind(f"{failure}: {why(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no more memory, of the machine or of a GPU."""
    names = [each.__name__ for each in type(error).__mro__]
    return {"MemoryError", "OutOfMemoryError"} & {*names} != set() or any(word in str(error) for word in _NO_MEMORY)


def nearest(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The valid names most like `name`, best first; the first few of all when none is alike."""
    names = tuple(dict.fromkeys(names))
    return alike(name, names) or names[:8]


def alike(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names so much like `name` that they may have been meant, best first."""
    scored = ((likeness(name, other), other) for other in dict.fromkeys(names))
    return tuple(other for score, other in sorted(scored, reverse=True)[:3] if score[0] >= ALIKE)


def likeness(name: str, other: str) -> tuple[float, float]:
    """How much two names are alike, from 0 to 1: at most, and as a whole. The first counts only as many words of
    `other` as `name` has, where that is more: `w4a61` is `w4a16_gptq` with an end missing rather than `w8a16`."""
    name, other = name.lower(), other.lower()
    start = "_".join(other.split("_")[: name.count("_") + 1])
    whole, begun = (difflib.SequenceMatcher(None, text, name).ratio() for text in (other, start))
    return max(whole, begun), whole


def unknown(source: str, path: str, kind: str, name: str, names: Iterable[str], remedy: str = "") -> Problem:
    """The problem that `name` is no `kind`: with the nearest of `names`, or with all of them when none is alike."""
    names = tuple(dict.fromkeys(names))
    close = alike(name, names)
    if not close and names:
        remedy = "\n    ".join(filter(None, (f"there is: {', '.join(names)}", remedy)))
    return Problem(source, path, f"unknown {kind} {name!r}", close, remedy)


def and_more(names: Sequence[str]) -> str:
    """The first of `names`, and how many others there are: `lm_head and 3 more`."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
