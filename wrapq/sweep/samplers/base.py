"""What a sampler is, and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from wrapq.recipe.axes import Axes
from wrapq.recipe.schema import Sweep as Config
from wrapq.registry import Registry
from wrapq.sweep.jobs import Outcome
from wrapq.sweep.options import SweepOptions, check_options

SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "wrapq.sweep.samplers")


@dataclass(frozen=True)
class Suggestion:
    """One combination to try: the number of its job, from 1, and the values by key."""

    number: int
    values: Mapping[str, str]


class Sampler(ABC):
    """Chooses values for axes.

    A subclass declares its options as a nested `Options` and registers itself:

        @SAMPLERS.register("grid")
        class Grid(Sampler): ...

    Args:
        options: the validated options.
        axes: what varies.
        name: the sweep's.
        minimize: the figures to make small, most important first.
    """

    Options: ClassVar[type[SweepOptions]] = SweepOptions

    def __init__(self, options: SweepOptions, axes: Axes, name: str, minimize: Sequence[str]) -> None:
        self.options: Any = options
        self.axes, self.name, self.minimize = axes, name, tuple(minimize)

    @abstractmethod
    def preview(self) -> Iterable[Mapping[str, str]]:
        """The values of the jobs that are resolved before the first is run; raises `SweepError`."""

    @property
    @abstractmethod
    def total(self) -> int:
        """How many jobs there will be."""

    def open(self, folder: Path) -> None:  # noqa: B027 - most remember nothing
        """Begin in the sweep's folder, or go on there; raises `WrapqError`."""

    @abstractmethod
    def ask(self, count: int) -> list[Suggestion]:
        """What to try next; nothing when there is no more. A sampler that learns gives at most `count`."""

    def tell(self, suggestion: Suggestion, outcome: Outcome) -> None:  # noqa: B027 - a grid does not learn
        """What became of a suggestion."""

    def elsewhere(self) -> list[tuple[int, Mapping[str, str], Outcome]]:
        """What was tried, and came out, by an earlier process of this sweep or on other machines."""
        return []


def make_sampler(config: Config, axes: Axes, minimize: Sequence[str]) -> Sampler:
    """The sampler that the settings ask for; raises `SweepError`."""
    kind, options = check_options(SAMPLERS, "sweep.sampler", config.sampler, config.options)
    return kind(options, axes, config.name, minimize)
