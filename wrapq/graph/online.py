"""What a graph is once the inputs of some modules are changed at each forward."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from wrapq.graph.dataflow import ChannelEdge, Graph, owned_columns


def after_online(graph: Graph, changed: Collection[str], by: str) -> Graph:
    """`graph` once the stage `by` changes the inputs of the modules `changed` at each forward: nothing can be moved
    across that, but their own inputs can be divided behind it."""
    own: dict[str, ChannelEdge] = {}
    for edge in graph.own_inputs.values():
        for among in (True, False):
            if consumers := tuple(c for c in edge.consumers if (c.module in changed) == among):
                producer = f"{consumers[0].module}.input"
                own[producer] = replace(edge, producer=producer, consumers=consumers)
    edges = tuple(_without_consumers(edge, changed, by) for edge in graph.edges)
    return replace(graph, edges=edges, own_inputs=own)


def _without_consumers(edge: ChannelEdge, changed: Collection[str], by: str) -> ChannelEdge:
    """`edge`, which owns no channel that a module of `changed` reads."""
    if not (those := [consumer for consumer in edge.consumers if consumer.module in changed]):
        return edge
    owned = edge.owned.clone()
    for consumer in those:
        owned[consumer.columns[consumer.columns >= 0]] = False
    rest = [replace(c, columns=owned_columns(c.columns, owned)) for c in edge.consumers]
    kept = tuple(c for c in rest if bool((c.columns >= 0).any()) or not bool(owned.any()))
    others = (*edge.other_consumers, *(f"{c.module}, whose input {by} changes at each forward" for c in those))
    return replace(edge, owned=owned, consumers=kept, other_consumers=others)
