"""What a data source is, its registry, and how one is made from a recipe's options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wrapq.errors import CalibrationError, ProblemsError
from wrapq.registry import Configurable, Place, Registry, build

if TYPE_CHECKING:
    from torch import Tensor

SOURCES: Registry[type[Source]] = Registry("data source", "wrapq.data.sources")


class Source(Configurable, ABC):
    """A stream of text or token ids in a fixed order: reading it twice gives the same stream.

    A subclass registers itself:

        @SOURCES.register("text")
        class Text(TextSource): ...
    """

    @abstractmethod
    def check(self) -> None:
        """Verify what can be seen without reading much, so that a plan can refuse early; raises `CalibrationError`."""

    @abstractmethod
    def describe(self) -> str:
        """One short phrase that names the data: for messages, the plan and the tracked data set."""


@dataclass(frozen=True)
class Chat:
    """A document that is a conversation: the tokenizer's chat template makes a text of it.

    Attributes:
        messages: the turns, each with a `role`, and with `content`, which is text, or what else a template reads.
        tools: JSON schemas of the functions that the assistant may call; None where there are none.
        where: names it in messages, `data file 'chats.jsonl', line 3`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


class TextSource(Source):
    """A source of documents that still have to be tokenized."""

    @abstractmethod
    def documents(self) -> Iterator[str | Chat]:
        """The documents, in a fixed order; raises `CalibrationError` where the data cannot be read."""


class TokenSource(Source):
    """A source of token ids."""

    @abstractmethod
    def token_rows(self) -> Iterator[Tensor]:
        """Rows of token ids, int64 [L] each, in a fixed order; raises `CalibrationError`."""


def make_source(name: str, options: Mapping[str, Any] | None = None) -> Source:
    """The source called `name` with `options`, not yet read; raises `CalibrationError` with all that is wrong."""
    try:
        return build(SOURCES, name, options or {}, Place("", "source", owner="source {}"))
    except ProblemsError as error:
        raise CalibrationError("\n".join(map(str, error.problems))) from None
