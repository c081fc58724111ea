"""One pass over the float model that collects input statistics block by block, for transforms that change it meanwhile.

The batches wait for each other before each block, so that only one block's statistics are in memory. Whoever is handed
them may change the block they are of, as long as its function stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.calibration.forwards import BatchForward
from wrapq.calibration.processes import Processes
from wrapq.calibration.scheduler import run_blocks
from wrapq.graph.blocks import Batch, find_blocks, output_head
from wrapq.graph.layers import layer_info
from wrapq.observers.forward_context import forward_context, outside_batch
from wrapq.statistics.input import InputStatistics
from wrapq.wrappers.attention import Attention, watched
from wrapq.wrappers.quantizer import real_tokens


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    batches: Sequence[Batch],
    needs: Mapping[str, frozenset[str]],
    done: Callable[[Mapping[str, InputStatistics]], None],
    processes: Processes | None = None,
) -> None:
    """Run all batches once and hand out the input statistics of each block as soon as all of them have left it.

    Args:
        model: a float model, not wrapped.
        batches: what runs; those of this process among `processes`, which share the data.
        needs: for each module, by name, the statistics of its input that are wanted; modules with one input share them.
            `NAME:key` and `NAME:query` are keys and queries of the attention NAME after position encoding, [H_kv, M, D]
            with the queries of each head of the keys, or [M, D] where there is one head.
        done: called with the statistics of the modules of a block, or of those before or after all blocks, by name.
    """
    processes = processes or Processes()
    blocks = find_blocks(model)
    collected: dict[str, InputStatistics] = {}
    groups: dict[int, list[str]] = {}
    places = (place for name, _ in model.named_modules() for place in (name, *_scores(name)))
    for name, block in blocks.positions(places):
        if name in needs:
            groups.setdefault(block, []).append(name)

    def on_input(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        forward = forward_context().calibration
        if not isinstance(forward, BatchForward) or not args:
            return
        statistic, shared = forward.statistics_of(args[0], None, needs[name], collected, name)
        if not shared:
            with outside_batch():
                statistic.add(_rows(module, args[0].detach()), batch=forward.index)

    def on_scores(name: str, query: Tensor, key: Tensor) -> None:
        forward = forward_context().calibration
        for place, x in zip(_scores(name), (query, key), strict=True):
            if place in needs and isinstance(forward, BatchForward):
                rows = real_tokens(x.detach(), 2)
                rows = rows if rows.dim() == 3 else rows.transpose(0, 1).flatten(1, 2)
                with outside_batch():
                    statistic = collected.setdefault(place, InputStatistics(needs[place]))
                    by_key = rows.unflatten(0, (key.shape[1], -1)).flatten(1, 2)
                    statistic.add(by_key if len(by_key) > 1 else by_key[0], batch=forward.index)

    def hand_out(before: int) -> None:
        for group in sorted(group for group in groups if group < before):
            statistics = {name: collected.pop(name, InputStatistics(needs[name])) for name in groups.pop(group)}
            for name, statistic in statistics.items():
                processes.reduce(statistic, *_layout(model, name))
                statistic.complete = True
            done(statistics)

    forwards = [BatchForward(model, batch, index, quantizes=False) for index, batch in processes.share(batches)]
    with ExitStack() as stack:
        modules = {place: model.get_submodule(place.partition(":")[0]) for place in needs}
        for name, module in {place.partition(":")[0]: modules[place] for place in needs if ":" in place}.items():
            stack.enter_context(watched(module, partial(on_scores, name)))
        for name in (place for place in needs if ":" not in place):
            stack.callback(modules[name].register_forward_pre_hook(partial(on_input, name)).remove)
        layers = [model.get_submodule(name) for name in blocks.names()]
        head = output_head(model)
        until = None if head is None or any(module is head for module in modules.values()) else head
        run_blocks(layers, forwards, begin=hand_out, processes=processes, until=until)
    hand_out(blocks.count + 1)


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """`x` as a matrix of its channels [M, K], of real tokens only."""
    layer = layer_info(module)
    if layer is not None and layer.channel_axis == 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return real_tokens(x, 1).reshape(-1, x.shape[-1])


def _scores(name: str) -> tuple[str, str]:
    return f"{name}:query", f"{name}:key"


def _layout(model: nn.Module, place: str) -> tuple[int, int]:
    """The channels of what is gathered for a place, and in how many groups they are."""
    name, point, _ = place.partition(":")
    module: Any = model.get_submodule(name)
    if point:
        heads = getattr(module.config, "num_key_value_heads", None) or module.config.num_attention_heads
        return Attention.width(module, "key") or 0, heads
    layer = layer_info(module)
    layout = layer.consumes if layer else None
    return layout.width(module.get_parameter(layout.parameter)) if layout else 0, 1
