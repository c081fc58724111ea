"""A run in progress: what its steps share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from wrapq.calibration.processes import Processes
from wrapq.engine.progress import Progress
from wrapq.large_pages import give_back
from wrapq.recipe.schema import Settings
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.runs.folder import RunFolder
from wrapq.tracking.base import Tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a run is made and recorded, beyond its plan and settings.

    Attributes:
        resume: go on with the newest run of the recipe that did not finish, after its last finished block.
        folder: the run's folder, resumed from if it holds saved progress; None for a new one.
        tracker: what records the run; None for the one of the settings.
        name: what the tracked run is called; the recipe's name when empty.
        tags: of the tracked run, beside its own.
    """

    resume: bool = False
    folder: RunFolder | None = None
    tracker: Tracker | None = None
    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A run in progress: what its steps share."""

    plan: Plan
    settings: Settings
    folder: RunFolder
    tracker: Tracker
    progress: Progress
    device: torch.device
    processes: Processes
    options: RunOptions = RunOptions()
    seconds: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kernels: str = ""

    @cached_property
    def source(self) -> ModelSource:
        """Where the float model and its tokenizer come from."""
        return ModelSource(self.plan.recipe.model, self.settings.runtime.trust_remote_code)

    @property
    def streaming(self) -> bool:
        """Whether the model's blocks are loaded one at a time."""
        return self.settings.runtime.load == "streaming"

    @contextmanager
    def step(self, name: str, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """Time and show a step of the run; yields what to call after each of `total` units."""
        _log.info("%s", title)
        start = time.perf_counter()
        with self.progress.task(title, total, unit) as advance:
            yield advance
        give_back()
        self.seconds[name] = time.perf_counter() - start

    def note(self, text: str) -> None:
        """Add a note for the reader of the run: logged, shown and recorded."""
        _log.warning("%s", text)
        self.notes.append(text)
        self.progress.note(text)

    def note_once(self, text: str) -> None:
        """Add a note, unless it was made before."""
        if text not in self.notes:
            self.note(text)
