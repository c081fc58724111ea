"""One run on its way: what its steps share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from wrapq.calibration.processes import Processes
from wrapq.engine.folder import RunFolder
from wrapq.engine.progress import Progress
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.schema import Settings
from wrapq.resolve.plan import Plan
from wrapq.tracking import Tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    """What tells a tracked run from others of its recipe: a name instead of the recipe's, and tags beside its own."""

    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run on its way: what its steps share."""

    plan: Plan
    settings: Settings
    folder: RunFolder
    tracker: Tracker
    progress: Progress
    device: torch.device
    processes: Processes
    label: Label
    others: Mapping[str, Sequence[QuantSpec]] = field(default_factory=dict)
    """See `wrapq.calibration.decider.Decider.others`."""
    seconds: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kernels: str = ""

    @property
    def streaming(self) -> bool:
        """Whether the model's blocks are brought into memory one at a time."""
        return self.settings.runtime.load == "streaming"

    @contextmanager
    def step(self, name: str, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """A step of the run, timed and shown."""
        _log.info("%s", title)
        start = time.perf_counter()
        with self.progress.task(title, total, unit) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - start

    def note(self, text: str) -> None:
        """Say something that a reader of the run should know."""
        _log.warning("%s", text)
        self.notes.append(text)
        self.progress.note(text)
