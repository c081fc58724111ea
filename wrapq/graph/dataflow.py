"""Producer-consumer edges: output channels of one layer and the weights that consume them; and residual streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wrapq.graph.blocks import without_cache
from wrapq.graph.layers import LayerInfo, WeightLayout, layer_info
from wrapq.graph.mixtures import Mixtures
from wrapq.graph.tied import tied_modules
from wrapq.graph.trace import LayerInput, Producer, Trace, TracedSum, trace
from wrapq.wrappers.wrapper_registry import WRAPPERS

_EXAMPLE_TOKENS = 4
OWN_INPUT = LayerInfo("input", None, None)
"""What stands for the producer of an edge that begins at the input of its consumers."""
T = TypeVar("T")


@dataclass(frozen=True)
class Consumer:
    """A layer whose weight multiplies channels of a producer: `columns`, int64 [K], has for each input channel of the
    layer the producer's channel that it is, -1 for those of other producers and those that must not be changed."""

    module: str
    layer: LayerInfo
    columns: Tensor

    @property
    def layout(self) -> WeightLayout:
        """The weight that multiplies the channels."""
        return cast(WeightLayout, self.layer.consumes)

    def expand(self, factors: Tensor) -> Tensor:
        """Factors of the producer's channels [N] as factors of the input channels [K]; 1 for other producers'."""
        return torch.where(self.columns < 0, torch.ones_like(factors[:1]), factors[self.columns.clamp(min=0)])

    def reduce_max(self, values: Tensor, width: int) -> Tensor:
        """The largest of `values` [K] for each of the producer's `width` channels [N], which are several input channels
        where heads are repeated; 0 for channels that are not consumed."""
        owned = self.columns >= 0
        empty = torch.zeros(width, dtype=values.dtype, device=values.device)
        return empty.scatter_reduce(0, self.columns[owned], values[owned], "amax")


@dataclass(frozen=True)
class ChannelEdge:
    """A producer and all consumers of its output channels: an owned channel that is divided by a factor where it is
    produced, and multiplied by it in every consumer's weight, leaves the model's function as it is.

    Attributes:
        producer: the name of the module, and `layer` what it is.
        owned: bool [N], the output channels that nothing but `consumers` sees.
        consumers: the linears, convolutions, routers and experts that multiply them.
        ops_between: the operations between producer and consumers, as in `ChannelTag.ops`.
        other_consumers: what else sees the channels that are not owned, as far as consumers multiply them too.
        heads: int64 [H, D], the channels of each attention head whose tokens are mixed with weights of its own; None
            where there is no attention, or more than one size of head.
        norm: the batch norm between, which can be folded into the producer.
    """

    producer: str
    layer: LayerInfo
    owned: Tensor
    consumers: tuple[Consumer, ...]
    ops_between: frozenset[str]
    other_consumers: tuple[str, ...]
    heads: Tensor | None = None
    norm: str | None = None

    @property
    def width(self) -> int:
        """The number of output channels of the producer [N]."""
        return len(self.owned)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all modules that a change of the edge changes: producer, batch norm and consumers."""
        return (self.producer, *filter(None, [self.norm]), *(consumer.module for consumer in self.consumers))

    @property
    def fully_owned(self) -> bool:
        """Whether every channel may be changed."""
        return bool(self.owned.all())

    @property
    def unowned(self) -> bool:
        """Whether no channel may be changed."""
        return not bool(self.owned.any())

    @property
    def name(self) -> str:
        """The edge in plans and messages."""
        return f"{self.producer} -> {', '.join(consumer.module for consumer in self.consumers)}"


@dataclass(frozen=True)
class ResidualStream:
    """Tensors of one width that are added up, as the blocks of a transformer add to the hidden states.

    Attributes:
        writers: what adds to it, by the names of the modules, in order.
        norms: the norms that read the stream, in order.
        direct_consumers: the other layers that read it, with no norm between.
        other_consumers: operations that see or scale the stream, so that it cannot be rotated; empty where it can.
    """

    width: int
    writers: Mapping[str, LayerInfo]
    norms: tuple[str, ...]
    direct_consumers: tuple[str, ...]
    other_consumers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the first writer."""
        return next(iter(self.writers))


@dataclass(frozen=True)
class Graph:
    """All channel edges and residual streams of a model, in the order in which it runs.

    Attributes:
        own_inputs: for linears that read one tensor, an edge that begins at their own input, where that is divided at
            each forward; by the name of the input of the first of them.
        tied: for each module that shares a parameter, the modules it shares it with.
        linears: the number of input channels of each linear.
        heads: the channels of a head, for each attention whose scores go through the attention interface.
        batch_norms: for each the linear or convolution before it that has no other consumer; None where there is none.
    """

    edges: tuple[ChannelEdge, ...]
    streams: tuple[ResidualStream, ...]
    tied: Mapping[str, tuple[str, ...]]
    linears: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    batch_norms: Mapping[str, str | None] = field(default_factory=dict)
    own_inputs: Mapping[str, ChannelEdge] = field(default_factory=dict)

    @cached_property
    def by_producer(self) -> dict[str, ChannelEdge]:
        """The edge of each producer."""
        return {edge.producer: edge for edge in self.edges}

    def edge(self, target: str) -> ChannelEdge:
        """The edge of a producer, or of an own input."""
        return self.own_inputs.get(target) or self.by_producer[target]

    @cached_property
    def by_stream(self) -> dict[str, ResidualStream]:
        """The residual streams by their names."""
        return {stream.name: stream for stream in self.streams if stream.writers}

    @cached_property
    def consumers(self) -> dict[str, Consumer]:
        """Each layer that consumes channels, as in the last edge that ends in it."""
        return {consumer.module: consumer for edge in self.edges for consumer in edge.consumers}

    def tied_reason(self, names: Iterable[str]) -> str | None:
        """The first of the modules `names` that is tied to others, as a reason to leave it alone; None without one."""
        return next((f"{name} is tied to {', '.join(self.tied[name])}" for name in names if name in self.tied), None)


def owned_columns(columns: Tensor, owned: Tensor) -> Tensor:
    """`columns`, with -1 for channels that are not `owned` [N]."""
    return torch.where((columns >= 0) & owned[columns.clamp(min=0)], columns, -1)


def find_graph(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> Graph:
    """The channel edges and residual streams of a float `model`, on the meta device or not, traced in one forward with
    `inputs`, or a few token ids, as language models take them; raises `ModelError` if it cannot run without weights."""
    traced = trace(model, example_inputs(model) if inputs is None else inputs)
    linears, heads = _widths(model, "Linear", "input"), _widths(model, "Attention", "key")
    mixtures, norms = Mixtures(model), _batch_norms(traced)
    edges = tuple(each for edge in _edges(traced, norms) for each in _of_all_experts(edge, mixtures))
    streams = tuple(_with_all_experts(stream, mixtures) for stream in _streams(traced))
    own = {edge.producer: edge for edge in _own_inputs(model, traced, mixtures)}
    return Graph(edges, streams, tied_modules(model), linears, heads, norms, own)


def _own_inputs(model: nn.Module, traced: Trace, mixtures: Mixtures) -> Iterator[ChannelEdge]:
    seen: set[str] = set()
    for names in traced.shared.values():
        consumers = []
        for name in (name for name in dict.fromkeys(names) if name not in seen and mixtures.layer(name) is None):
            module = model.get_submodule(name)
            if (layer := layer_info(module)) is not None and layer.consumes is not None:
                width = layer.consumes.width(module.get_parameter(layer.consumes.parameter))
                consumers.append(Consumer(name, layer, torch.arange(width)))
        if consumers:
            owned = torch.ones(len(consumers[0].columns), dtype=torch.bool)
            yield ChannelEdge(f"{consumers[0].module}.input", OWN_INPUT, owned, tuple(consumers), frozenset(), ())
        seen |= set(names)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """A few token ids, as language models take them."""
    return without_cache(model, {"input_ids": torch.arange(1, 1 + _EXAMPLE_TOKENS)[None]})


def _of_all_experts(edge: ChannelEdge, mixtures: Mixtures) -> Iterator[ChannelEdge]:
    """`edge` with all experts among its consumers; where the first expert of a layer is the producer, an edge for each
    expert."""
    if (layer := mixtures.layer(edge.producer)) is None:
        consumers = (replace(c, module=name) for c in edge.consumers for name in mixtures.names(c.module))
        yield replace(edge, consumers=tuple(consumers))
        return
    if any(mixtures.layer(c.module) != layer for c in edge.consumers):  # they consume a sum over experts
        unowned = tuple(replace(c, columns=torch.full_like(c.columns, -1)) for c in edge.consumers)
        others = (*edge.other_consumers, "the sum of all experts")
        edge = replace(edge, owned=torch.zeros_like(edge.owned), consumers=unowned, other_consumers=others)
    for index, producer in enumerate(mixtures.names(edge.producer)):
        consumers = (
            replace(c, module=mixtures.names(c.module)[index]) if mixtures.layer(c.module) == layer else c
            for c in edge.consumers
        )
        yield replace(edge, producer=producer, consumers=tuple(consumers))


def _with_all_experts(stream: ResidualStream, mixtures: Mixtures) -> ResidualStream:
    writers = {name: layer for first, layer in stream.writers.items() for name in mixtures.names(first)}
    direct_consumers = tuple(name for first in stream.direct_consumers for name in mixtures.names(first))
    return replace(stream, writers=writers, direct_consumers=direct_consumers)


def _widths(model: nn.Module, kind: str, point: str) -> dict[str, int]:
    """The channels at `point` of each module under a wrapper of a kind, where they are known."""
    wrappers = ((name, module, WRAPPERS.find(module)) for name, module in model.named_modules())
    widths = {name: w.width(module, point) for name, module, w in wrappers if w is not None and w.kind == kind}
    return {name: width for name, width in widths.items() if width is not None}


def _edges(traced: Trace, norms: Mapping[str, str | None]) -> Iterator[ChannelEdge]:
    inputs = [(each.ids, each) for each in traced.inputs.values() if each.layer.consumes is not None]
    consumers = _by_producer(traced, inputs)
    others = _by_producer(traced, ((ids, (ids, who)) for ids, who in _other_consumers(traced)))
    heads = _by_producer(traced, ((ids, ids) for ids in traced.heads))
    for name, producer in traced.producers.items():
        if producer.layer is None or name not in consumers:
            continue
        edge = _edge(producer, consumers[name], others.get(name, ()), heads.get(name, ()))
        if (before := norms.get(name)) is not None:  # folded into it, the batch norm produces nothing of its own
            layer = cast(LayerInfo, traced.producers[before].layer)
            edge = replace(edge, producer=before, layer=layer, norm=name)
        yield edge


def _batch_norms(traced: Trace) -> dict[str, str | None]:
    consumed = ((each.ids, each.name) for each in traced.inputs.values() if each.layer.consumes is not None)
    consumers = _by_producer(traced, (*_other_consumers(traced), *consumed))
    norms: dict[str, str | None] = {}
    for name in (p.name for p in traced.producers.values() if p.layer is not None and p.layer.kind == "batch_norm"):
        norms[name], given = None, traced.inputs.get(name)
        if given is None or given.ops:
            continue
        for before in traced.producers_of(given.ids):
            producer = traced.producers[before]
            fits = producer.layer is not None and producer.layer.kind in ("linear", "conv")
            if fits and _is_all(given.ids, producer) and set(consumers.get(before, ())) <= {name}:
                norms[name] = before
    return norms


def _by_producer(traced: Trace, values: Iterable[tuple[Tensor, T]]) -> dict[str, list[T]]:
    """For each producer the values whose channel numbers are among its channels."""
    return _grouped((name, value) for ids, value in values for name in traced.producers_of(ids))


def _grouped(values: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    grouped: dict[str, list[T]] = {}
    for name, value in values:
        grouped.setdefault(name, []).append(value)
    return grouped


def _other_consumers(traced: Trace) -> list[tuple[Tensor, str]]:
    """Channel numbers with a consumer that cannot be rescaled."""
    sums = [(ids, "a sum") for total in traced.sums for ids in (total.left, total.right)]
    without_weight = [(each.ids, each.name) for each in traced.inputs.values() if each.layer.consumes is None]
    return [*traced.unsafe, *sums, *without_weight]


def _edge(
    producer: Producer, inputs: Sequence[LayerInput], others: Sequence[tuple[Tensor, str]], heads: Sequence[Tensor]
) -> ChannelEdge:
    columns = [_columns(each.ids, producer) for each in inputs]
    owned = torch.zeros(producer.width, dtype=torch.bool)
    for own in columns:
        owned[own[own >= 0]] = True
    names: dict[str, None] = {}
    for ids, other in others:
        seen = _columns(ids, producer)
        seen = seen[seen >= 0]
        if bool(owned[seen].any()):
            names[other] = None
        owned[seen] = False
    consumers = []
    for each, own in zip(inputs, columns, strict=True):
        kept = owned_columns(own, owned)
        if bool((kept >= 0).any()) or not bool(owned.any()):
            consumers.append(Consumer(each.name, each.layer, kept))
    layer, ops = cast(LayerInfo, producer.layer), frozenset[str]().union(*(each.ops for each in inputs))
    return ChannelEdge(producer.name, layer, owned, tuple(consumers), ops, tuple(names), _heads(heads, producer))


def _heads(heads: Sequence[Tensor], producer: Producer) -> Tensor | None:
    columns = [_columns(ids, producer) for ids in heads]
    whole = [rows for own in columns if len(rows := own[(own >= 0).all(1)])]
    return torch.cat(whole).unique(dim=0) if len({rows.shape[1] for rows in whole}) == 1 else None


def _columns(ids: Tensor, producer: Producer) -> Tensor:
    """Channel numbers as channels of `producer`; -1 for those of others."""
    own = (ids >= producer.base) & (ids < producer.base + producer.width)
    return torch.where(own, ids - producer.base, -1)


@dataclass(eq=False)
class _Group:
    """Producers that are joined by sums, of which `last` is the number of the last one."""

    names: dict[str, None] = field(default_factory=dict)
    last: int = -1


def _streams(traced: Trace) -> Iterator[ResidualStream]:
    """What sums join; like all of this file in time linear in the operations of the forward."""
    group_of: dict[str, _Group] = {}
    for number, total in enumerate(traced.sums):
        names = [total.producer.name, *traced.producers_of(total.left), *traced.producers_of(total.right)]
        touching = sorted({group_of[name] for name in names if name in group_of}, key=lambda group: group.last)
        first, *others = touching or [_Group()]
        joined = [name for group in others for name in group.names] + names
        first.names |= dict.fromkeys(joined)
        first.last = number
        group_of |= dict.fromkeys(joined, first)
    sums = _grouped((total.producer.name, (number, total)) for number, total in enumerate(traced.sums))
    unsafe = _by_producer(traced, ((ids, (number, who)) for number, (ids, who) in enumerate(traced.unsafe)))
    inputs = _by_producer(traced, ((each.ids, (number, each)) for number, each in enumerate(traced.inputs.values())))
    for group in sorted(set(group_of.values()), key=lambda group: group.last):
        parts = (_of_group(group, sums), _of_group(group, unsafe), _of_group(group, inputs))
        if (stream := _stream(traced, list(group.names), *parts)) is not None:
            yield stream


def _of_group(group: _Group, values: Mapping[str, Sequence[tuple[int, T]]]) -> list[T]:
    """The values of all producers of a group by their numbers, each once."""
    numbered = dict(value for name in group.names for value in values.get(name, ()))
    return [numbered[number] for number in sorted(numbered)]


def _stream(
    traced: Trace, group: Sequence[str], sums: Sequence[TracedSum], unsafe: Sequence[str], inputs: Sequence[LayerInput]
) -> ResidualStream | None:
    producers = [traced.producers[name] for name in group]
    others: dict[str, None] = {}
    for total in sums:
        sides = (total.left, total.right)
        parts = [traced.producers[part] for ids in sides for part in traced.producers_of(ids)]
        if len(parts) != len(sides) or not all(map(_is_all, sides, parts)):
            return None  # channels of one tensor added to others of it, as in rotary embeddings
        others |= dict.fromkeys(total.ops - {"gain"})
    others |= dict.fromkeys(unsafe)
    return ResidualStream(
        width=producers[0].width,
        writers={producer.name: producer.layer for producer in producers if producer.layer is not None},
        norms=tuple(each.name for each in inputs if each.layer.kind == "norm"),
        direct_consumers=tuple(each.name for each in inputs if each.layer.kind != "norm"),
        other_consumers=tuple(others),
    )


def _is_all(ids: Tensor, producer: Producer) -> bool:
    return len(ids) == producer.width and bool((ids == producer.ids).all())
