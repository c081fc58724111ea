"""The arguments of a sweep: Hydra overrides of which some give several values.

    recipe=w4a16_rtn,w4a16_gptq                choices
    recipe=glob(w4*)                           presets by their names
    calibration.samples=range(8,33,8)          whole numbers or fractions at a distance
    stack.round.damp=interval(0.001,0.1)       anything in between, for samplers that choose; tag(log, interval(...))

An axis is such an override. All else is left as it was written, for `compose`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.hydra_defaults import parse_override
from wrapq.recipe.preset_index import Library

MAX_JOBS = 1000
_FIXED = ("sweep", "launcher", "tracking", "paths")


@dataclass(frozen=True)
class Interval:
    """Every number between two.

    Attributes:
        low: the least, which counts.
        high: the largest, which counts.
        whole: only whole numbers.
        log: their logarithms are spread evenly.
    """

    low: float
    high: float
    whole: bool
    log: bool


@dataclass(frozen=True)
class Axis:
    """One thing that varies: the key as an override names it, and its values as an override would write them."""

    key: str
    values: tuple[str, ...] | Interval

    def samples(self) -> tuple[str, ...]:
        """All values, or the ends of an interval."""
        if isinstance(self.values, Interval):
            kind = int if self.values.whole else float
            return str(kind(self.values.low)), str(kind(self.values.high))
        return self.values

    def describe(self) -> list[str] | dict[str, Any]:
        """The values as plain data."""
        return asdict(self.values) if isinstance(self.values, Interval) else list(self.values)


@dataclass(frozen=True)
class Axes:
    """What a sweep varies, and the overrides that all its jobs have."""

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]

    def overrides(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """The overrides of the job with `values`, by key."""
        return (*self.fixed, *(f"{key}={value}" for key, value in values.items()))

    def grid(self) -> Iterator[dict[str, str]]:
        """Every combination of the values, the last axis fastest; of an interval its ends."""
        samples = {axis.key: axis.samples() for axis in self.axes}
        return (dict(zip(samples, values, strict=True)) for values in itertools.product(*samples.values()))

    def cover(self) -> Iterator[dict[str, str]]:
        """As few combinations as hold every value once."""
        samples = {axis.key: axis.samples() for axis in self.axes}
        for index in range(max(map(len, samples.values()), default=1)):
            yield {key: values[index % len(values)] for key, values in samples.items()}


def parse_axes(texts: Sequence[str], extra_dirs: Sequence[Path] = ()) -> Axes:
    """The axes among the overrides `texts`; raises `RecipeError` with all that cannot be parsed or not vary."""
    axes: list[Axis] = []
    fixed: list[str] = []
    problems: list[Problem] = []
    library = _Names(extra_dirs)
    for text in texts:
        try:
            override = _parse(text, library)
            if override is None:
                fixed.append(text)
            else:
                axes.append(Axis(override.get_key_element(), _values(override, text)))
        except RecipeError as error:
            problems += error.problems
    twice = {axis.key for axis in axes if sum(other.key == axis.key for other in axes) > 1}
    what = "varies twice: give all its values at once"
    problems += [Problem(f"override {key}=...", "", what) for key in sorted(twice)]
    if problems:
        raise RecipeError(problems)
    return Axes(tuple(axes), tuple(fixed))


def _parse(text: str, library: _Names) -> Override | None:
    """The override when it gives several values; None when it gives one."""
    try:
        override = OverridesParser.create(library).parse_overrides([text])[0]  # type: ignore[arg-type]
        sweeps = override.is_sweep_override()
    except Exception:  # the generated parser raises errors of many kinds; the other says which way to write it
        sweeps = False
    if not sweeps:
        parse_override(text)
        return None
    if (group := override.key_or_group.split(".")[0]) in _FIXED:
        raise _refusal(text, f"{group} is the same for all jobs: give one value")
    return override


def _values(override: Override, text: str) -> tuple[str, ...] | Interval:
    if not override.is_interval_sweep():
        values = tuple(dict.fromkeys(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1)))
        if not values:
            raise _refusal(text, "gives no value: nothing fits it")
        if len(values) > MAX_JOBS:
            raise _refusal(text, f"gives more than {MAX_JOBS:,} values")
        return values
    sweep: Any = override.value()
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    if not low < high or (log and low <= 0):
        more = ", and above 0 for a logarithm" if log else ""
        raise _refusal(text, "is no interval", f"the first number must be the smaller{more}")
    return Interval(low, high, isinstance(low, int) and isinstance(high, int), log)


def _refusal(text: str, what: str, remedy: str = "") -> RecipeError:
    return RecipeError([Problem(f"override {text}", "", what, remedy=remedy)])


class _Names:
    """What `glob(...)` asks Hydra's loader for: the names that a group offers."""

    def __init__(self, extra_dirs: Sequence[Path]) -> None:
        self.extra_dirs = extra_dirs

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        """The options of a group, in order of name."""
        return sorted(Library(self.extra_dirs).options(group_name))
