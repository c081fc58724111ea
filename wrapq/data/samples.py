"""From a data source to samples: token windows of one length, chosen by a seed, with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wrapq.data.chats import answers, notes_on
from wrapq.data.sources.base import Chat, Source, TextSource, TokenSource
from wrapq.data.tokenized import Extent, first_tokens, tokenized
from wrapq.errors import CalibrationError

POOL = 16  # windows looked at per window asked for
CHARS_PER_TOKEN = 32  # of one document no more text than this is tokenized per token still wanted


@dataclass(frozen=True)
class Samples:
    """Token windows ready for a model.

    Attributes:
        input_ids: int64 [S, T].
        attention_mask: bool [S, T], False on padding (always on the right); None when there is no padding.
        digest: sha256 over shape, token ids and masks, in hexadecimal.
        notes: what a reader of the run should know, such as fewer windows than asked for.
        scored: bool [S, T], True on the tokens whose prediction counts; None when all of them do.
        read: what was read of the source, and what came of it.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    digest: str
    notes: tuple[str, ...] = ()
    scored: Tensor | None = None
    read: Extent = field(default_factory=Extent)

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def counted(self) -> Tensor | None:
        """The positions, bool [S, T], from which a token is predicted that counts: one that is scored, and no padding,
        nor is the one before it. None where all but the last do."""
        if self.attention_mask is None and self.scored is None:
            return None
        every = torch.ones_like(self.input_ids, dtype=torch.bool)
        real = every if self.attention_mask is None else self.attention_mask
        found = torch.zeros_like(every)
        found[:, :-1] = real[:, :-1] & real[:, 1:] & (every if self.scored is None else self.scored)[:, 1:]
        return found

    def batches(
        self, size: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Consecutive token ids [B, T], mask [B, T] (or None) and `counted` [B, T] (or None), B = `size` except perhaps
        the last."""
        masks = self.attention_mask, self.counted()
        for start in range(0, len(self.input_ids), size):
            part = slice(start, start + size)
            mask, counted = (None if each is None else each[part].to(device) for each in masks)
            yield self.input_ids[part].to(device), mask, counted


class _Row(NamedTuple):
    ids: Tensor  # int64 [n]
    scored: Tensor  # bool [n]
    whole: bool = True  # nothing of the document is cut


def build_samples(
    source: Source,
    tokenizer: Any,
    samples: int | None,
    seq_len: int,
    seed: int | None,
    pack: bool = True,
    vocab_size: int | None = None,
    score: Literal["all", "assistant"] | None = None,
) -> Samples:
    """The samples [S, T] of `source`: the same for the same content, tokenizer and arguments, on every machine.

    With `pack` the documents are tokenized without special tokens, joined by the end-of-text token, and cut into
    consecutive windows of `seq_len` (a shorter last one is dropped), which begin with what the tokenizer puts before a
    text. Without, each document is one row with the tokenizer's own special tokens, cut to `seq_len` and padded on the
    right to the longest row. A document that holds what the tokenizer puts before it, as a rendered chat does, has it
    once all the same. A conversation ends with what its template writes there, with no end-of-text token of ours.
    Rows of token ids are taken as they are.

    Only the first `POOL * samples` windows (or rows) of the source are looked at, so that a large corpus is not
    tokenized whole for a few samples; a permutation drawn from `seed` chooses among them. `seed=None` takes the first
    ones in order, which is what an evaluation compares with others; `samples=None` takes all, in order of the seed.

    Args:
        source: text or token rows.
        tokenizer: a transformers tokenizer; may be None for a source of token rows.
        samples: how many windows, S.
        seq_len: T, tokens per window.
        vocab_size: the model's; default is the tokenizer's. Token ids beyond it are refused.
        score: what is scored: all but the tokens that a sample or a conversation begins with, or what the assistant
            writes, each conversation being a row (or each answer, see `answers`), since a window from the middle of one
            lacks what is answered; those in which that begins beyond `seq_len` are left out. None: nothing is stated.

    Raises:
        CalibrationError: no text, not one whole window, token ids outside the vocabulary, no chat template, nothing to
            score.
        ModelError: the tokenizer fails.
    """
    if seq_len < 2 or (samples is not None and samples < 1):
        raise CalibrationError(f"samples={samples} of seq_len={seq_len}: at least 1 sample of 2 tokens is needed")
    pool = samples if samples is None or seed is None else samples * POOL
    read = Extent()
    start = torch.tensor(first_tokens(tokenizer) if isinstance(source, TextSource) else [], dtype=torch.int64)
    if score == "assistant":
        rows = _taken(_answers(source, tokenizer, start, seq_len, read), pool, seq_len, read)
    elif not pack:
        rows = _taken(_rows(source, tokenizer, seq_len, start, read), pool, seq_len, read)
    elif seq_len > len(start):
        pieces = _packed(source, tokenizer, pool and pool * seq_len, start, read)
        rows = _windows(pieces, source, pool, seq_len, start, read)
    else:
        what = f"seq_len={seq_len} leaves no token after the {len(start)} that the tokenizer begins with"
        raise CalibrationError(f"{source.describe()}: {what}")
    if not rows:
        what = f"no answer of the assistant that begins within {seq_len} tokens" if read.unanswered else "no text in it"
        raise CalibrationError(f"{source.describe()}: {what}")
    _check_vocabulary(rows, source, len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size)
    read.sequences = len(rows)
    if samples is not None and len(rows) < samples:
        what = f"{source.describe()} gives {len(rows)} samples of {seq_len} tokens, {samples} were asked for"
        what += f"; left over after the last: {read.left_over}" if read.left_over else ""
        read.notes[what] = None
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[i] for i in order]
    rows = rows[:samples]
    if cut := sum(not row.whole for row in rows):
        read.notes[f"documents longer than {seq_len} tokens, of which the rest is cut: {cut:,} of {len(rows):,}"] = None
    if read.unanswered:
        what = f"no answer of the assistant that begins within {seq_len} tokens"
        read.notes[f"documents left out, which hold {what}: {read.unanswered:,}"] = None
    input_ids, mask = _stack([row.ids for row in rows], tokenizer)
    scored = _scored(rows, input_ids, mask, tokenizer, read) if score else None
    return Samples(input_ids, mask, digest_of(input_ids, mask, scored), tuple(read.notes), scored, read)


def digest_of(input_ids: Tensor, mask: Tensor | None, scored: Tensor | None = None) -> str:
    """sha256 over shape, token ids (int64, little endian) and masks (one byte each, when there is one)."""
    found = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    found.update(input_ids.cpu().contiguous().numpy().astype("<i8").tobytes())
    for name, each in (("mask", mask), ("scored", scored)):
        if each is not None:
            found.update(name.encode() + each.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _packed(source: Source, tokenizer: Any, wanted: int | None, start: Tensor, read: Extent) -> Iterator[Tensor]:
    """Pieces of the joined stream, int64 [n] each, until `wanted` tokens are there; none begins with `start`."""
    if isinstance(source, TokenSource):
        yield from _counted(source, read)  # already tokens: their maker decided what stands between the rows
        return
    eos = getattr(tokenizer, "eos_token_id", None)
    between = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    first = True
    for ids, chat in tokenized(source, tokenizer, wanted and wanted * CHARS_PER_TOKEN, special=False, read=read):
        if not (first or chat):
            yield between
            if eos is None:
                read.notes["the tokenizer has no end-of-text token: documents are joined without one"] = None
        first = False
        yield _without(start, ids)


def _counted(source: TokenSource, read: Extent) -> Iterator[Tensor]:
    read.noun = "rows"
    for row in source.token_rows():
        read.documents += 1
        yield row


def _without(start: Tensor, ids: Tensor) -> Tensor:
    """`ids` [n] without `start`, where they begin with it."""
    return ids[len(start) :] if len(start) and torch.equal(ids[: len(start)], start) else ids


def _windows(
    pieces: Iterable[Tensor], source: Source, pool: int | None, seq_len: int, start: Tensor, read: Extent
) -> list[_Row]:
    """The stream cut into windows [T], at most `pool` of them, each after `start`."""
    gathered: list[Tensor] = []
    length = seq_len - len(start)
    for piece in pieces:
        gathered.append(piece)
        read.tokens += len(piece)
        if pool is not None and read.tokens >= pool * length:
            break
    else:
        read.whole = True
    if 0 < read.tokens < length:
        raise CalibrationError(f"{source.describe()}: {read.tokens} tokens, fewer than one sample of seq_len={seq_len}")
    windows = torch.cat(gathered).split(length)[: read.tokens // length][:pool] if read.tokens else ()
    read.left_over = read.tokens - length * len(windows)
    return [_row(torch.cat([start, window]), start) for window in windows]


def _row(ids: Tensor, start: Tensor) -> _Row:
    """A row of which all is scored but `start`."""
    return _Row(ids, torch.arange(len(ids)) >= len(start))


def _rows(source: Source, tokenizer: Any, seq_len: int, start: Tensor, read: Extent) -> Iterator[_Row]:
    """A row for each document, with `start` once where the tokenizer puts it."""
    if isinstance(source, TokenSource):
        yield from (_row(ids, start) for ids in _counted(source, read))
        return
    for ids, chat in tokenized(source, tokenizer, seq_len * CHARS_PER_TOKEN, special=True, read=read):
        rest = _without(start, ids)
        begun = chat or len(rest) < len(ids)  # else the tokenizer has put nothing before this one
        yield _row(torch.cat([start, rest if chat else _without(start, rest)]) if begun else ids, start)


def _answers(source: Source, tokenizer: Any, start: Tensor, seq_len: int, read: Extent) -> Iterator[_Row]:
    """A row for each conversation in which the assistant writes something before `seq_len`, which is what is scored."""
    needed = f"{source.describe()}: to score the assistant alone takes conversations, and here"
    if not isinstance(source, TextSource):
        raise CalibrationError(f"{needed} are token ids")
    for document in source.documents():
        if not isinstance(document, Chat):
            if document.strip():
                raise CalibrationError(f"{needed} is text: give rows with messages, which the option `field` names")
            read.blank += 1
            continue
        read.notes |= dict.fromkeys(notes_on(document, tokenizer))
        read.documents += 1
        written = 0
        for ids, answer in answers(document, tokenizer, read.notes):
            rest = _without(start, torch.tensor(ids))
            scored = torch.tensor([False] * len(start) + answer[len(ids) - len(rest) :])
            if scored[1:seq_len].any():
                written += 1
                yield _Row(torch.cat([start, rest]), scored)
        read.unanswered += not written


def _taken(rows: Iterable[_Row], pool: int | None, seq_len: int, read: Extent) -> list[_Row]:
    """At most `pool` of the rows, each cut to `seq_len`."""
    found: list[_Row] = []
    for ids, scored, _ in rows:
        read.tokens += len(ids)
        found.append(_Row(ids[:seq_len], scored[:seq_len], len(ids) <= seq_len))
        if len(found) == pool:
            break
    else:
        read.whole = True
    return found


def _stack(rows: list[Tensor], tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.stack(rows), None
    pad = next((i for i in (getattr(tokenizer, f"{k}_token_id", None) for k in ("pad", "eos")) if i is not None), 0)
    input_ids = torch.full((len(rows), longest), pad, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return input_ids, mask


def _scored(rows: list[_Row], input_ids: Tensor, mask: Tensor | None, tokenizer: Any, read: Extent) -> Tensor | None:
    """Which tokens are scored, bool [S, T]; None when all are that something comes before."""
    scored, _ = _stack([row.scored for row in rows], None)
    bos, eos = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos"))
    if read.chats and bos not in (None, eos):
        scored &= input_ids != bos  # which some templates write before each prompt
    every = scored[:, 1:] if mask is None else scored[:, 1:] | ~mask[:, 1:]
    return None if every.all() else scored


def _check_vocabulary(rows: list[_Row], source: Source, size: int | None) -> None:
    low, high = min(int(row.ids.min()) for row in rows), max(int(row.ids.max()) for row in rows)
    if low < 0 or (size is not None and high >= size):
        bad, last = low if low < 0 else high, "" if size is None else size - 1
        what = f"token id {bad} is outside the vocabulary (0 to {last}): the data was tokenized for another model"
        raise CalibrationError(f"{source.describe()}: {what}")
