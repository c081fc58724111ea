"""From a data source to samples: token windows of one length, chosen by a seed, with a digest."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from wrapq.data.sources.base import Source, TextSource, TokenSource
from wrapq.errors import CalibrationError, ModelError, reading

POOL = 16  # windows looked at per window asked for
CHARS_PER_TOKEN = 32  # of one document no more text than this is tokenized per token still wanted
CHUNK_CHARS = 1 << 20  # documents are tokenized together up to this much text
_KEPT = 8  # chunks whose tokens a process keeps
_kept: OrderedDict[object, list[Tensor]] = OrderedDict()


@dataclass(frozen=True)
class Samples:
    """Token windows ready for a model.

    Attributes:
        input_ids: int64 [S, T].
        attention_mask: bool [S, T], False on padding (always on the right); None when there is no padding.
        digest: sha256 over shape, token ids and mask, in hexadecimal.
        notes: what a reader of the run should know, such as fewer windows than asked for.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor | None]]:
        """Consecutive pairs of token ids [B, T] and mask [B, T] (or None), B = `size` except perhaps the last."""
        for start in range(0, len(self.input_ids), size):
            part = slice(start, start + size)
            mask = None if self.attention_mask is None else self.attention_mask[part].to(device)
            yield self.input_ids[part].to(device), mask


def build_samples(
    source: Source,
    tokenizer: Any,
    samples: int | None,
    seq_len: int,
    seed: int | None,
    pack: bool = True,
    vocab_size: int | None = None,
) -> Samples:
    """The samples [S, T] of `source`: the same for the same content, tokenizer and arguments, on every machine.

    With `pack` the documents are tokenized without special tokens, joined by the end-of-text token, and cut into
    consecutive windows of `seq_len` (a shorter last one is dropped), which begin with what the tokenizer puts before a
    text. Without, each document is one row with the tokenizer's own special tokens, cut to `seq_len` and padded on the
    right to the longest row. A document that holds what the tokenizer puts before it, as a rendered chat does, has it
    once all the same. Rows of token ids are taken as they are.

    Only the first `POOL * samples` windows (or rows) of the source are looked at, so that a large corpus is not
    tokenized whole for a few samples; a permutation drawn from `seed` chooses among them. `seed=None` takes the first
    ones in order, which is what an evaluation compares with others; `samples=None` takes all, in order of the seed.

    Args:
        source: text or token rows.
        tokenizer: a transformers tokenizer; may be None for a source of token rows.
        samples: how many windows, S.
        seq_len: T, tokens per window.
        vocab_size: the model's; default is the tokenizer's. Token ids beyond it are refused.

    Raises:
        CalibrationError: no text, not one whole window, token ids outside the vocabulary.
        ModelError: the tokenizer fails.
    """
    if seq_len < 2 or (samples is not None and samples < 1):
        raise CalibrationError(f"samples={samples} of seq_len={seq_len}: at least 1 sample of 2 tokens is needed")
    pool = samples if samples is None or seed is None else samples * POOL
    notes: list[str] = []
    start = torch.tensor(first_tokens(tokenizer) if isinstance(source, TextSource) else [], dtype=torch.int64)
    if pack:
        if seq_len <= len(start):
            what = f"seq_len={seq_len} leaves no token after the {len(start)} that the tokenizer begins with"
            raise CalibrationError(f"{source.describe()}: {what}")
        rows = _windows(_packed(source, tokenizer, pool and pool * seq_len, start, notes), source, pool, seq_len, start)
    else:
        rows = _rows(source, tokenizer, pool, seq_len, start)
    if not rows:
        raise CalibrationError(f"{source.describe()}: no text in it")
    _check_vocabulary(rows, source, len(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size)
    if samples is not None and len(rows) < samples:
        notes.append(f"{source.describe()} gives {len(rows)} samples of {seq_len} tokens, {samples} were asked for")
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[i] for i in order]
    input_ids, mask = _stack(rows[:samples], tokenizer)
    return Samples(input_ids, mask, digest_of(input_ids, mask), tuple(notes))


def first_tokens(tokenizer: Any) -> list[int]:
    """The token ids that the tokenizer puts before a text: that of the beginning of a sequence, others, or none."""
    plain, whole = (_encoded("a", tokenizer, special) for special in (False, True))
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return list(whole[: next(places, 0)])


def digest_of(input_ids: Tensor, mask: Tensor | None) -> str:
    """sha256 over shape, token ids (int64, little endian) and mask (one byte each, when there is one)."""
    found = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    found.update(input_ids.cpu().contiguous().numpy().astype("<i8").tobytes())
    if mask is not None:
        found.update(b"mask" + mask.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _packed(source: Source, tokenizer: Any, wanted: int | None, start: Tensor, notes: list[str]) -> Iterator[Tensor]:
    """Pieces of the joined stream, int64 [n] each, until `wanted` tokens are there; none begins with `start`."""
    if isinstance(source, TokenSource):
        yield from source.token_rows()  # already tokens: their maker decided what stands between the rows
        return
    eos = getattr(tokenizer, "eos_token_id", None)
    between = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    for number, ids in enumerate(_tokenized(source, tokenizer, wanted and wanted * CHARS_PER_TOKEN, special=False)):
        if number:
            yield between
            if eos is None and not notes:
                notes.append("the tokenizer has no end-of-text token: documents are joined without one")
        yield ids[len(start) :] if _begins(ids, start) else ids


def _begins(ids: Tensor, start: Tensor) -> bool:
    return len(start) > 0 and torch.equal(ids[: len(start)], start)


def _windows(pieces: Iterable[Tensor], source: Source, pool: int | None, seq_len: int, start: Tensor) -> list[Tensor]:
    """The stream cut into windows [T], at most `pool` of them, each after `start`."""
    gathered: list[Tensor] = []
    count, length = 0, seq_len - len(start)
    for piece in pieces:
        gathered.append(piece)
        count += len(piece)
        if pool is not None and count >= pool * length:
            break
    if 0 < count < length:
        raise CalibrationError(f"{source.describe()}: {count} tokens, fewer than one sample of seq_len={seq_len}")
    windows = torch.cat(gathered).split(length)[: count // length][:pool] if count else ()
    return [torch.cat([start, window]) for window in windows]


def _rows(source: Source, tokenizer: Any, pool: int | None, seq_len: int, start: Tensor) -> list[Tensor]:
    """One row [<= T] per document, at most `pool` of them, with `start` once where the tokenizer puts it."""
    if isinstance(source, TokenSource):
        found = source.token_rows()
    else:
        found = _tokenized(source, tokenizer, seq_len * CHARS_PER_TOKEN, special=True)
    again = (ids[len(start) :] if _begins(ids[len(start) :], start) else ids for ids in found)
    return [ids[:seq_len] for ids in islice(again, pool)]


def _tokenized(source: Source, tokenizer: Any, limit: int | None, special: bool) -> Iterator[Tensor]:
    """Each document that is not blank as int64 [n]; no more than `limit` characters of one are read."""
    if not isinstance(source, TextSource):
        raise CalibrationError(f"{source.describe()}: neither text nor token rows")
    for texts in _chunks(source.documents(), limit):
        yield from _token_ids(texts, tokenizer, special)


def _token_ids(texts: list[str], tokenizer: Any, special: bool) -> list[Tensor]:
    """As `_tokenized`, for one chunk; the last few are kept, as the jobs of a sweep read the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # whose text says all that the result depends on
    key = None if backend is None else (hashlib.sha256(backend.to_str().encode()).digest(), special, tuple(texts))
    if key is not None and key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    found = [torch.tensor(ids, dtype=torch.int64) for ids in _encoded(texts, tokenizer, special) if len(ids)]
    if key is not None:
        _kept[key] = found
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def _encoded(text: str | list[str], tokenizer: Any, special: bool) -> Any:
    with reading("the model's tokenizer cannot read the text", ModelError):
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _chunks(documents: Iterable[str], limit: int | None) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        if not document.strip():
            continue
        chunk.append(document[:limit])
        size += len(chunk[-1])
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _stack(rows: list[Tensor], tokenizer: Any) -> tuple[Tensor, Tensor | None]:
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.stack(rows), None
    pad = next((i for i in (getattr(tokenizer, f"{k}_token_id", None) for k in ("pad", "eos")) if i is not None), 0)
    input_ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return input_ids, mask


def _check_vocabulary(rows: list[Tensor], source: Source, size: int | None) -> None:
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or (size is not None and high >= size):
        bad, last = low if low < 0 else high, "" if size is None else size - 1
        what = f"token id {bad} is outside the vocabulary (0 to {last}): the data was tokenized for another model"
        raise CalibrationError(f"{source.describe()}: {what}")
