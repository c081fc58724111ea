"""The sampler contract: which values a sweep tries, and the registry of the ways to choose them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrapq.errors import ProblemsError
from wrapq.registry import Configurable, Place, Registry, build
from wrapq.sweep.job import SweepError

if TYPE_CHECKING:
    from wrapq.recipe.axes import Axes
    from wrapq.recipe.schema import Sweep as Config
    from wrapq.sweep.job import Outcome

SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "wrapq.sweep.samplers")


@dataclass(frozen=True)
class Suggestion:
    """One combination to try: the number of its job, from 1, and the values by key."""

    number: int
    values: Mapping[str, str]


class Sampler(Configurable, ABC):
    """Chooses values for axes.

    A subclass registers itself:

        @SAMPLERS.register("grid")
        class Grid(Sampler): ...

    Args:
        axes: what varies.
        name: the sweep's.
        minimize: the figures to make small, most important first.
        options: the validated options.
    """

    def __init__(self, axes: Axes, name: str, minimize: Sequence[str], options: Any = None) -> None:
        super().__init__(options)
        self.axes, self.name, self.minimize = axes, name, tuple(minimize)

    @abstractmethod
    def preview(self) -> Iterable[Mapping[str, str]]:
        """The values of all jobs that can be resolved before the first is run; raises `SweepError`."""

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of jobs."""

    def open(self, folder: Path) -> None:
        """Begin, or continue, with the state in the sweep's folder; raises `WrapqError`."""

    @abstractmethod
    def ask(self, count: int) -> list[Suggestion]:
        """The next values to try, none at the end. A sampler that learns gives at most `count`."""

    def tell(self, suggestion: Suggestion, outcome: Outcome) -> None:
        """Learn the outcome of a suggestion."""

    def elsewhere(self) -> list[tuple[int, Mapping[str, str], Outcome]]:
        """Numbers, values and outcomes from an earlier process of this sweep or from other machines."""
        return []


def make_sampler(config: Config, axes: Axes, minimize: Sequence[str]) -> Sampler:
    """The sampler that the settings ask for; raises `SweepError`."""
    place = Place("sweep", "sampler", owner="sampler {}")
    try:
        return build(SAMPLERS, config.sampler, config.options, place, axes, config.name, minimize)
    except ProblemsError as error:
        raise SweepError(error.problems) from None
