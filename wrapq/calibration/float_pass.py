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
        done: called with the statistics of the modules of a block, or of those before or after all blocks, by name.
    """
    processes = processes or Processes()
    blocks = find_blocks(model)
    collected: dict[str, InputStatistics] = {}
    groups: dict[int, list[str]] = {}
    for name, block in blocks.positions(name for name, _ in model.named_modules()):
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

    def hand_out(before: int) -> None:
        for group in sorted(group for group in groups if group < before):
            statistics = {name: collected.pop(name, InputStatistics(needs[name])) for name in groups.pop(group)}
            for name, statistic in statistics.items():
                processes.reduce(statistic, _width(model.get_submodule(name)))
                statistic.complete = True
            done(statistics)

    forwards = [BatchForward(model, batch, index, quantizes=False) for index, batch in processes.share(batches)]
    with ExitStack() as stack:
        for name in needs:
            hook = model.get_submodule(name).register_forward_pre_hook(partial(on_input, name))
            stack.callback(hook.remove)
        layers = [model.get_submodule(name) for name in blocks.names()]
        head = output_head(model)
        until = None if head is None or any(model.get_submodule(name) is head for name in needs) else head
        run_blocks(layers, forwards, begin=hand_out, processes=processes, until=until)
    hand_out(blocks.count + 1)


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """`x` as a matrix of its channels [M, K], of real tokens only."""
    layer = layer_info(module)
    if layer is not None and layer.channel_axis == 1:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return real_tokens(x, 1).reshape(-1, x.shape[-1])


def _width(module: nn.Module) -> int:
    layer = layer_info(module)
    layout = layer.consumes if layer else None
    return layout.width(module.get_parameter(layout.parameter)) if layout else 0
