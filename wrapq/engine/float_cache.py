"""A cache of the float model's block outputs on the evaluation data, which are the same for every recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from wrapq.data.samples import Samples
from wrapq.engine.calibrate import float_root
from wrapq.engine.context import Run
from wrapq.statistics.cache import StoreUse, digest
from wrapq.statistics.store import Store

_SHARE = 0.1
"""The share of the store that one evaluation may take."""
_FASTEST = 1e8
"""Bytes per second: outputs computed faster are not stored. Reading and checking is about five times as fast."""


class FloatOutputs(StoreUse):
    """The outputs of the float model's blocks on each evaluation batch, as far as the store has them.

    Args:
        store: where they are kept.
        root: all that they depend on: model, data, code, versions, device class.
        windows: how many sequences there are in all batches.
    """

    def __init__(self, store: Store, root: Mapping[str, str], windows: int) -> None:
        super().__init__(store)
        self.windows, self._root = windows, digest("float outputs", root)

    def get(self, batch: int) -> list[Tensor] | None:
        """The output [B, T, D] of each block on a batch, to the bit; None where the store lacks them."""
        if (stored := self.store.get(digest(self._root, batch))) is None:
            self.misses += 1
            return None
        self.hits, self.seconds = self.hits + 1, self.seconds + float(stored.facts["seconds"])
        return [stored.tensors[str(index)] for index in range(len(stored.tensors))]

    def keep(self, batch: int, outputs: Sequence[Tensor], seconds: float) -> None:
        """Store the output [B, T, D] of each block on a batch, for which the model ran so long, if it is worth it."""
        size = sum(output.nbytes for output in outputs)
        total = size / len(outputs[0]) * self.windows
        if total <= _SHARE * self.store.limit and size <= _FASTEST * seconds:
            named = {str(index): output for index, output in enumerate(outputs)}
            self.write(digest(self._root, batch), named, {"kind": "float model on evaluation data"}, seconds)


def float_outputs(run: Run, model: nn.Module, samples: Samples) -> FloatOutputs | None:
    """The cache for a wrapped `model` on `samples`; None on a GPU, which computes faster than a disk reads, and where
    blocks are streamed or the store is off."""
    runtime, size = run.settings.runtime, run.plan.recipe.evaluation.batch_size
    if run.streaming or run.device.type != "cpu" or not runtime.cache_gb:
        return None
    root = float_root(run, model) | {"evaluation": samples.digest, "evaluation_batch_size": str(size)}
    store = Store(run.settings.paths.cache_folder(), runtime.cache_gb * 1e9)
    return FloatOutputs(store, root, len(samples.input_ids))
