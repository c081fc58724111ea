"""What an exporter of another project's format declares, so that the plan can ask it before anything is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from wrapq.errors import Problem, and_more
from wrapq.recipe.schema import Export
from wrapq.registry import Configurable, Place, Registry, build
from wrapq.resolve.plan import ModulePlan, Plan


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
    extra: ClassVar[tuple[str, tuple[str, ...]]] = ("", ())
    """The extra with what makes and runs the export, and the packages of it that it asks for."""

    takes_parts: ClassVar[bool] = False
    """Whether it can say what PT2E makes of a part of a model, a graph of torch's operators."""

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

    def size(self, folder: Path) -> int:
        """Bytes of the weights in `folder`."""
        return sum(file.stat().st_size for file in folder.glob(self.weights))

    def versions(self) -> dict[str, str]:
        """Those of the packages that it asks for, as far as they are installed."""
        found = {}
        for package in self.extra[1]:
            with suppress(PackageNotFoundError):
                found[package] = version(package)
        return found

    def missing_packages(self) -> Iterator[Problem]:
        """Those that it asks for and that are not installed."""
        (extra, packages), found = self.extra, self.versions()
        if missing := [package for package in packages if package not in found]:
            are = "which is not" if len(missing) == 1 else "which are not"
            what = f"it is made and run with {' and '.join(missing)}, {are} installed"
            yield Problem("", "export", what, (), f"pip install 'wrapq[{extra}]'")

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


def make_exporter(name: str, config: Export, source: Callable[[str], str] = lambda path: "") -> Exporter:
    """The exporter called `name`, with the options of `config`; raises `ProblemsError`, with what is the `source` of a
    dotted path, where there is none of that name or an option is wrong."""
    place = Place(f"export.{name}", "", Export.model_fields, source, "the format {}")
    return build(EXPORTERS, name, config.options, place)


def make_exporters(exports: Mapping[str, Export]) -> dict[str, Exporter]:
    """The exporters that a recipe, which is checked, asks for, by their formats."""
    return {name: make_exporter(name, config) for name, config in exports.items()}
