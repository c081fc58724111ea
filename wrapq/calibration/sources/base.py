"""What a data source is, its registry, and how one is made from a recipe's options."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wrapq.errors import CalibrationError, nearest
from wrapq.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

SOURCES: Registry[type[Source]] = Registry("data source", "wrapq.calibration.sources")


class SourceOptions(BaseModel):
    """Base of every source's options: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(ABC):
    """A stream of text or token ids in a fixed order: reading it twice gives the same stream.

    A subclass declares its options as a nested pydantic model `Options` and registers itself:

        @SOURCES.register("text")
        class Text(TextSource): ...

    Attributes:
        options: the validated options.
    """

    Options: ClassVar[type[SourceOptions]] = SourceOptions

    def __init__(self, options: SourceOptions) -> None:
        self.options: Any = options

    @abstractmethod
    def check(self) -> None:
        """Verify what can be seen without reading much, so that a plan can refuse early; raises `CalibrationError`."""

    @abstractmethod
    def describe(self) -> str:
        """One short phrase that names the data: for messages, the plan and the tracked data set."""


class TextSource(Source):
    """A source of documents that still have to be tokenized."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order; raises `CalibrationError` where the data cannot be read."""


class TokenSource(Source):
    """A source of token ids."""

    @abstractmethod
    def token_rows(self) -> Iterator[Tensor]:
        """Rows of token ids, int64 [L] each, in a fixed order; raises `CalibrationError`."""


def make_source(name: str, options: Mapping[str, Any] | None = None) -> Source:
    """The source called `name` with `options`, not yet read.

    Raises:
        UnknownNameError: no source has that name.
        CalibrationError: an option is unknown, missing or of the wrong type; all of them are listed at once.
    """
    kind = SOURCES.get(name)
    try:
        return kind(kind.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        lines = [_explain(detail, kind.Options.model_fields) for detail in error.errors()]
        raise CalibrationError("\n".join(f"data source {name!r}: {line}" for line in lines)) from None


def require(package: str, source: str) -> None:
    """Refuse `source` when the optional `package` is not installed; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise CalibrationError(
            f"data source {source!r} needs the package {package!r}, which is not installed: pip install 'wrapq[data]'"
        )


def _explain(detail: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"unknown option {key!r}; did you mean: {', '.join(nearest(key, fields)) or 'it takes none'}"
    if detail["type"] == "missing":
        return f"option {key!r} is missing"
    return f"option {key}={detail['input']!r}: {detail['msg']}"
