"""Every combination."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from wrapq.errors import Problem
from wrapq.recipe.axes import MAX_JOBS, Interval
from wrapq.sweep.job import SweepError
from wrapq.sweep.samplers.base import SAMPLERS, Sampler, Suggestion


@SAMPLERS.register("grid")
class Grid(Sampler):
    """All combinations of the values, the last axis fastest."""

    _asked = False

    def preview(self) -> Iterable[Mapping[str, str]]:
        remedy = "write the values, or range(...), or let a sampler choose: sweep=optuna"
        problems = [
            Problem(f"override {axis.key}=interval(...)", "", "a grid cannot try every number", (), remedy)
            for axis in self.axes.axes
            if isinstance(axis.values, Interval)
        ]
        if not problems and self.total > MAX_JOBS:
            problems = [Problem("the grid", "", f"has {self.total:,} jobs; {MAX_JOBS:,} are the most")]
        if problems:
            raise SweepError(problems)
        return self.axes.grid()

    @property
    def total(self) -> int:
        return math.prod(len(axis.samples()) for axis in self.axes.axes)

    def ask(self, count: int) -> list[Suggestion]:
        values = [] if self._asked else self.axes.grid()
        self._asked = True
        return [Suggestion(number, chosen) for number, chosen in enumerate(values, 1)]
