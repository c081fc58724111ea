"""What an exporter of another project's format declares, so that the plan can ask it before anything is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from wrapq.errors import Problem, and_more
from wrapq.recipe.schema import Export
from wrapq.registry import Configurable, Place, Registry, build
from wrapq.resolve.plan import ModulePlan, Plan

NONE = "none"
"""The format that stands for no export."""


class Folder(Protocol):
    """Where an exporter writes: every file in it is whole or absent."""

    path: Path

    def write(self, name: str, save: Callable[[Path], object]) -> Path:
        """Let `save` write the file `name`."""

    def write_files(self, save: Callable[[Path], object]) -> list[str]:
        """Let `save` write files into a folder."""

    def write_text(self, name: str, text: str) -> Path:
        """Write `text` as the file `name`."""


class Reading(NamedTuple):
    """What an export computes in its runtime.

    Attributes:
        logits: float32 [B, T, V].
        measured: `first_token_ms`, `token_ms` and `peak_mb`, as far as they are known.
        tokens: int64 [1, N], what it goes on with after the first sequence, each token the likeliest.
        notes: what somebody must know who loads it.
        left_float: the points that were left float.
    """

    logits: Tensor
    measured: Mapping[str, float] = {}
    tokens: Tensor | None = None
    notes: tuple[str, ...] = ()
    left_float: frozenset[str] = frozenset()


@dataclass
class Refusals:
    """What of a plan a format cannot say.

    Attributes:
        refused: for each source, reason and remedy the names of what cannot be exported.
    """

    refused: dict[tuple[str, str, str], list[str]] = field(default_factory=dict, kw_only=True)

    def refuse(self, module: ModulePlan, what: str, remedy: str) -> None:
        """Refuse `module`, for the reason `what`."""
        sources = " + ".join(dict.fromkeys(point.sources[-1] for point in module.points if point.sources))
        self.refused.setdefault((sources, what, remedy), []).append(module.name)

    @property
    def problems(self) -> list[Problem]:
        """What is refused; a reason that many modules have is told once."""
        refused = self.refused.items()
        return [
            Problem(source, "", f"{and_more(names)}: {what}", (), remedy) for (source, what, remedy), names in refused
        ]


class Exporter(Configurable, ABC):
    """A copy of a converted model in another project's format."""

    weights: ClassVar[str] = "*.safetensors"
    """Which of its files hold the weights."""

    @abstractmethod
    def check(self, plan: Plan) -> Iterable[Problem]:
        """Everything in `plan` that the format cannot say, with the reason."""

    @abstractmethod
    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        """Write configuration and weights of the converted `model`, beside its tokenizer, which is in the folder
        already; equal models give equal bytes."""

    @abstractmethod
    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        """What the other project computes from the files in `folder` for token ids [B, T].

        Raises:
            ModelError: the other project does not load the files, or loads only some of them.
        """

    def layers(self, plan: Plan) -> Iterable[str]:
        """What the format calls each kind of quantized layer in `plan`, and how many there are."""
        return ()

    def notes(self, plan: Plan) -> Iterable[str]:
        """What is said a little differently in the format than in `plan`."""
        return ()

    @abstractmethod
    def tolerance(self, plan: Plan) -> float:
        """The largest difference to our logits, relative to their norm, that is rounding and not a mistake."""


EXPORTERS: Registry[type[Exporter]] = Registry("export format", "wrapq.export")
FORMAT = Place("export", "format", Export.model_fields, owner="the format {}", instead=(NONE,))
"""Where a recipe names an exporter."""


def make_exporter(config: Export) -> Exporter | None:
    """The exporter that `config`, which is checked, asks for; None for none."""
    if config.format == NONE:
        return None
    return build(EXPORTERS, config.format, config.options, FORMAT)
