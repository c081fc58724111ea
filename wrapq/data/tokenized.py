"""From the documents of a source to their tokens."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrapq.data.chats import notes_on, rendered
from wrapq.data.sources.base import Chat, Source, TextSource
from wrapq.errors import CalibrationError, ModelError, reading

CHUNK_CHARS = 1 << 20  # documents are tokenized together up to this much text
_KEPT = 8  # chunks whose tokens a process keeps
_kept: OrderedDict[object, list[Tensor]] = OrderedDict()


@dataclass
class Extent:
    """What was read of a source.

    Attributes:
        noun: what the documents are.
        documents: documents, or rows of token ids, that are not blank.
        chats: whether conversations are among them.
        shortened: of these, how many only to a limit of characters.
        limit: that limit.
        blank: documents left out because they are.
        tokens: in all of them.
        sequences: that came of them.
        left_over: of these, how many after the last sequence.
        unanswered: conversations left out since there is nothing to score in them.
        whole: nothing is left.
        notes: what else a reader of the run should know, once each.
    """

    noun: str = "documents"
    documents: int = 0
    chats: bool = False
    shortened: int = 0
    limit: int = 0
    blank: int = 0
    tokens: int = 0
    sequences: int = 0
    left_over: int = 0
    unanswered: int = 0
    whole: bool = False
    notes: dict[str, None] = field(default_factory=dict)

    def __str__(self) -> str:
        given = f"{'all' if self.whole else 'the first'} {self.documents:,} {self.noun}"
        if self.documents == 1:
            given = f"the {'one' if self.whole else 'first'} {self.noun[:-1]}"
        made = f"{self.sequences:,} sequence{'s' * (self.sequences != 1)}"
        parts = [f"{made} in the {self.tokens:,} tokens of {given}"]
        if self.shortened:
            parts.append(f"{self.shortened:,} read to {self.limit:,} characters only")
        if self.whole and self.blank:
            parts.append(f"{self.blank:,} blank left out")
        if self.left_over:
            parts.append(f"{self.left_over:,} token{'s' * (self.left_over != 1)} not used")
        return ", ".join(parts)


class Piece(NamedTuple):
    """The token ids [n] of one document; whether it is a conversation."""

    ids: Tensor
    chat: bool


class _Text(NamedTuple):
    text: str
    chat: bool
    shortened: bool


def tokenized(source: Source, tokenizer: Any, limit: int | None, special: bool, read: Extent) -> Iterator[Piece]:
    """Each document that is not blank, counted in `read`; no more than `limit` characters of one are read.

    A text has the tokenizer's special tokens if `special` says so; a conversation has those that its template writes.
    """
    if not isinstance(source, TextSource):
        raise CalibrationError(f"{source.describe()}: neither text nor token rows")
    read.limit = limit or 0
    for texts in _chunks(source, tokenizer, limit, read):
        chat = texts[0].chat
        ids = _token_ids([each.text for each in texts], tokenizer, special and not chat)
        for each, found in zip(texts, ids, strict=True):
            if len(found):
                read.documents += 1
                read.chats |= chat
                read.shortened += each.shortened
                yield Piece(found, chat)


def first_tokens(tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer puts before a text: that of the beginning of a sequence, others, or none."""
    plain, whole = (_encoded("a", tokenizer, special) for special in (False, True))
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return list(whole[: next(places, 0)])


def _chunks(source: TextSource, tokenizer: Any, limit: int | None, read: Extent) -> Iterator[list[_Text]]:
    """Documents to be tokenized together: all of them texts, or all conversations."""
    chunk: list[_Text] = []
    size = 0
    for document in source.documents():
        if isinstance(document, Chat):
            text = rendered(document, tokenizer)
            read.notes |= dict.fromkeys(notes_on(document, tokenizer))
        else:
            text = document
        if not text.strip():
            read.blank += 1
            continue
        given = _Text(text[:limit], isinstance(document, Chat), limit is not None and len(text) > limit)
        if chunk and chunk[0].chat != given.chat:
            yield chunk
            chunk, size = [], 0
        chunk.append(given)
        size += len(given.text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _token_ids(texts: list[str], tokenizer: Any, special: bool) -> list[Tensor]:
    """The token ids [n] of each text of one chunk; the last few are kept, as the jobs of a sweep read the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # whose text says all that the result depends on
    key = None if backend is None else (hashlib.sha256(backend.to_str().encode()).digest(), special, tuple(texts))
    if key is not None and key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    found = [torch.tensor(ids, dtype=torch.int64) for ids in _encoded(texts, tokenizer, special)]
    if key is not None:
        _kept[key] = found
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def _encoded(text: str | list[str], tokenizer: Any, special: bool) -> Any:
    with reading("the model's tokenizer cannot read the text", ModelError):
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
