"""Who feeds whom: channels that one module makes and others multiply, and residual streams they are added to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wrapq.calibration.forward import without_cache
from wrapq.calibration.mixtures import Mixtures
from wrapq.calibration.slots import Leaf
from wrapq.calibration.trace import Read, Source, Trace, trace
from wrapq.wrappers.registry import WRAPPERS

_EXAMPLE_TOKENS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Reader:
    """A module whose weight multiplies what a producer made.

    Attributes:
        columns: int64 [K], for each input channel the producer's channel that it is; -1 for one of another producer, or
            one that may not be changed.
    """

    module: str
    leaf: Leaf
    columns: Tensor

    def spread(self, factors: Tensor) -> Tensor:
        """Factors of the producer's channels [N] as factors of the input's [K]; 1 where it is not the producer's."""
        return torch.where(self.columns < 0, torch.ones_like(factors[:1]), factors[self.columns.clamp(min=0)])

    def gather(self, values: Tensor, width: int) -> Tensor:
        """The largest of `values` [K] for each of the producer's `width` channels [N], as with repeated heads; 0 for a
        channel that is not read."""
        owned = self.columns >= 0
        empty = torch.zeros(width, dtype=values.dtype, device=values.device)
        return empty.scatter_reduce(0, self.columns[owned], values[owned], "amax")


@dataclass(frozen=True)
class Feed:
    """What one module makes and others multiply: channels may be scaled here if all that see them scale back.

    Attributes:
        producer: the module's name, and `leaf` what it is.
        channels: bool [N], the output channels that nobody but `readers` sees.
        readers: the linears, convolutions, routers and experts that read them.
        path: what happens on the way: `attention`, `product`, `positive` (see `Mark`).
        seen_by: who sees the other channels, as far as linears read them too.
        heads: int64 [H, D], the channels of each head whose tokens attention mixes with weights of its own; None
            where there is no attention, or more than one size of head.
        norm: the batch norm that they pass first, which can be folded into the producer.
    """

    producer: str
    leaf: Leaf
    channels: Tensor
    readers: tuple[Reader, ...]
    path: frozenset[str]
    seen_by: tuple[str, ...]
    heads: Tensor | None = None
    norm: str | None = None

    @property
    def closed(self) -> bool:
        """Whether all channels may be changed."""
        return bool(self.channels.all())

    @property
    def open(self) -> bool:
        """Whether none may."""
        return not bool(self.channels.any())

    @property
    def name(self) -> str:
        """As plans and messages call it."""
        return f"{self.producer} -> {', '.join(reader.module for reader in self.readers)}"


@dataclass(frozen=True)
class Stream:
    """A residual stream: tensors of one width that are added up.

    Attributes:
        writers: the modules whose outputs are added, in order, and `leaves` what they are.
        norms: the norms that read it, in order.
        readers: other modules that read it without a norm between.
        seen_by: who else sees it or adds to it, so that it cannot be rotated; empty where nobody does.
    """

    width: int
    writers: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]
    seen_by: tuple[str, ...]

    @property
    def name(self) -> str:
        """That of its first writer."""
        return self.writers[0]


@dataclass(frozen=True)
class Graph:
    """All feeds and streams of a model, in the order in which it runs.

    Attributes:
        tied: for each module of whose parameters one is another's too, the others.
        linears: the channels that each linear reads.
        heads: the channels of a head, for each attention whose scores are ours to compute.
        batch_norms: for each the linear or convolution before it that nobody else reads; None where there is none.
    """

    feeds: tuple[Feed, ...]
    streams: tuple[Stream, ...]
    tied: Mapping[str, tuple[str, ...]]
    linears: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    batch_norms: Mapping[str, str | None] = field(default_factory=dict)

    @cached_property
    def by_producer(self) -> dict[str, Feed]:
        """The feed of each producer."""
        return {feed.producer: feed for feed in self.feeds}

    @cached_property
    def by_stream(self) -> dict[str, Stream]:
        """The streams by their names."""
        return {stream.name: stream for stream in self.streams if stream.writers}

    @cached_property
    def by_reader(self) -> dict[str, tuple[Feed, ...]]:
        """The feeds that each module reads."""
        found: dict[str, tuple[Feed, ...]] = {}
        for feed in self.feeds:
            for reader in feed.readers:
                found[reader.module] = (*found.get(reader.module, ()), feed)
        return found


def find_graph(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> Graph:
    """Who feeds whom in `model`.

    Args:
        model: a float model, on the meta device or not.
        inputs: arguments for one small forward; None takes a few token ids, as language models do.

    Raises:
        ModelError: the forward cannot run without weights.
    """
    if inputs is None:
        inputs = without_cache(model, {"input_ids": torch.arange(1, 1 + _EXAMPLE_TOKENS)[None]})
    found = trace(model, inputs)
    linears, heads = _widths(model, "Linear", "input"), _widths(model, "Attention", "key")
    mixtures, norms = Mixtures(model), _batch_norms(found)
    feeds = tuple(each for feed in _feeds(found, norms) for each in _of_all_experts(feed, mixtures))
    streams = tuple(_with_all_experts(stream, mixtures) for stream in _streams(found))
    return Graph(feeds, streams, _tied(model), linears, heads, norms)


def _of_all_experts(feed: Feed, mixtures: Mixtures) -> Iterator[Feed]:
    """`feed` with all experts among its readers, or, where the first one of a layer makes it, one for each of them."""
    layer = mixtures.layer(feed.producer)
    if layer is None:
        names = ((reader, name) for reader in feed.readers for name in mixtures.names(reader.module))
        yield replace(feed, readers=tuple(replace(reader, module=name) for reader, name in names))
        return
    if any(mixtures.layer(reader.module) != layer for reader in feed.readers):  # what they read is no expert's alone
        readers = tuple(replace(reader, columns=torch.full_like(reader.columns, -1)) for reader in feed.readers)
        seen_by = (*feed.seen_by, "the sum of all experts")
        feed = replace(feed, channels=torch.zeros_like(feed.channels), readers=readers, seen_by=seen_by)
    for index, producer in enumerate(mixtures.names(feed.producer)):
        readers = tuple(
            replace(reader, module=mixtures.names(reader.module)[index])
            if mixtures.layer(reader.module) == layer
            else reader
            for reader in feed.readers
        )
        yield replace(feed, producer=producer, readers=readers)


def _with_all_experts(stream: Stream, mixtures: Mixtures) -> Stream:
    writers = [(name, leaf) for first, leaf in zip(stream.writers, stream.leaves, strict=True)
               for name in mixtures.names(first)]  # fmt: skip
    return replace(
        stream,
        writers=tuple(name for name, _ in writers),
        leaves=tuple(leaf for _, leaf in writers),
        readers=tuple(name for first in stream.readers for name in mixtures.names(first)),
    )


def _widths(model: nn.Module, kind: str, point: str) -> dict[str, int]:
    """The channels that come to `point` of each module of a kind, where they are known."""
    wrappers = ((name, module, WRAPPERS.find(module)) for name, module in model.named_modules())
    widths = {name: w.width(module, point) for name, module, w in wrappers if w is not None and w.kind == kind}
    return {name: width for name, width in widths.items() if width is not None}


def _feeds(found: Trace, norms: Mapping[str, str | None]) -> tuple[Feed, ...]:
    reads = _by_source(found, ((read.ids, read) for read in found.reads.values() if read.leaf.reads is not None))
    seen = _by_source(found, ((ids, (ids, who)) for ids, who in _seen_by(found)))
    heads = _by_source(found, ((ids, ids) for ids in found.heads))
    feeds = (
        _feed(s, reads.get(name, ()), seen.get(name, ()), heads.get(name, ())) for name, s in found.sources.items()
    )
    return tuple(_behind_norm(feed, norms, found) for feed in feeds if feed is not None)


def _behind_norm(feed: Feed, norms: Mapping[str, str | None], found: Trace) -> Feed:
    """`feed` as that of the module whose part the batch norm that makes it can be; others as they are."""
    before = norms.get(feed.producer)
    leaf = None if before is None else found.sources[before].leaf
    return feed if before is None or leaf is None else replace(feed, producer=before, leaf=leaf, norm=feed.producer)


def _batch_norms(found: Trace) -> dict[str, str | None]:
    """See `Graph.batch_norms`."""
    reads = ((read.ids, read.name) for read in found.reads.values() if read.leaf.reads is not None)
    seen = _by_source(found, (*_seen_by(found), *reads))
    norms: dict[str, str | None] = {}
    for name in (s.name for s in found.sources.values() if s.leaf is not None and s.leaf.kind == "batch_norm"):
        norms[name], read = None, found.reads.get(name)
        if read is None or read.path:
            continue
        for before in found.made_by(read.ids):
            source = found.sources[before]
            fits = source.leaf is not None and source.leaf.kind in ("linear", "conv") and _is_all(read.ids, source)
            if fits and set(seen.get(before, ())) <= {name}:
                norms[name] = before
    return norms


def _by_source(found: Trace, met: Iterable[tuple[Tensor, T]]) -> dict[str, list[T]]:
    """For each source that has any of the channels with which something is given, what is given with them."""
    grouped: dict[str, list[T]] = {}
    for ids, what in met:
        for name in found.made_by(ids):
            grouped.setdefault(name, []).append(what)
    return grouped


def _seen_by(found: Trace) -> list[tuple[Tensor, str]]:
    """Channels that somebody sees who cannot scale back."""
    seen = list(found.escapes)
    for total in found.sums:
        seen += [(total.left, "a sum"), (total.right, "a sum")]
    return seen + [(read.ids, read.name) for read in found.reads.values() if read.leaf.reads is None]


def _feed(
    source: Source, reads: Sequence[Read], seen: Sequence[tuple[Tensor, str]], heads: Sequence[Tensor]
) -> Feed | None:
    meeting = [(read, _within(read.ids, source)) for read in reads]
    if not meeting or source.leaf is None:
        return None
    channels = torch.zeros(source.width, dtype=torch.bool)
    why: dict[str, None] = {}
    for _, columns in meeting:
        channels[columns[columns >= 0]] = True
    for ids, who in seen:
        columns = _within(ids, source)
        columns = columns[columns >= 0]
        if bool(channels[columns].any()):
            why[who] = None
        channels[columns] = False
    readers = []
    for read, columns in meeting:
        kept = torch.where((columns >= 0) & channels[columns.clamp(min=0)], columns, -1)
        if bool((kept >= 0).any()) or not bool(channels.any()):
            readers.append(Reader(read.name, read.leaf, kept))
    path = frozenset[str]().union(*(read.path for read, _ in meeting))
    return Feed(source.name, source.leaf, channels, tuple(readers), path, tuple(why), _heads(heads, source))


def _heads(heads: Sequence[Tensor], source: Source) -> Tensor | None:
    own = [rows for ids in heads if len(rows := _whole(_within(ids, source)))]
    if not own or len({rows.shape[1] for rows in own}) > 1:
        return None
    return torch.cat(own).unique(dim=0)


def _whole(rows: Tensor) -> Tensor:
    """The `rows` [H, D] all of whose channels are known."""
    return rows[(rows >= 0).all(1)]


def _within(ids: Tensor, source: Source) -> Tensor:
    """`ids` as channels of `source`; -1 for those of others."""
    own = (ids >= source.base) & (ids < source.base + source.width)
    return torch.where(own, ids - source.base, -1)


def _streams(found: Trace) -> tuple[Stream, ...]:
    groups: list[list[str]] = []
    for total in found.sums:
        names = [total.source.name, *found.made_by(total.left), *found.made_by(total.right)]
        touching = [group for group in groups if set(group) & set(names)]
        merged = list(dict.fromkeys([name for group in touching for name in group] + names))
        groups = [group for group in groups if group not in touching] + [merged]
    return tuple(stream for group in groups if (stream := _stream(found, group)) is not None)


def _stream(found: Trace, group: Sequence[str]) -> Stream | None:
    sources = [found.sources[name] for name in group]
    width = sources[0].width
    why: dict[str, None] = {}
    for total in found.sums:
        if total.source.name in group:
            sides = (total.left, total.right)
            parts = [found.sources[part] for ids in sides for part in found.made_by(ids)]
            if len(parts) != len(sides) or not all(map(_is_all, sides, parts)):
                return None  # channels of one tensor added to others of it, as in rotary embeddings
            why |= dict.fromkeys(total.path - {"gain"})
    why |= dict.fromkeys(who for ids, who in found.escapes if set(group) & set(found.made_by(ids)))
    reads = [read for read in found.reads.values() if set(group) & set(found.made_by(read.ids))]
    writers = {source.name: source.leaf for source in sources if source.leaf is not None}
    return Stream(
        width,
        tuple(writers),
        tuple(writers.values()),
        tuple(read.name for read in reads if read.leaf.kind == "norm"),
        tuple(read.name for read in reads if read.leaf.kind != "norm"),
        tuple(why),
    )


def _is_all(ids: Tensor, source: Source) -> bool:
    return len(ids) == source.width and bool((ids == source.ids).all())


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    tied: dict[str, tuple[str, ...]] = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            others = (other for other in names if other != name)
            tied[name] = tuple(dict.fromkeys((*tied.get(name, ()), *others)))
    return tied
