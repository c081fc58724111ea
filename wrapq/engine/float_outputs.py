"""The float model's part of an evaluation: the same for every recipe on one model and data, so that it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from wrapq.calibration.data import Samples
from wrapq.calibration.recall import digest
from wrapq.calibration.store import Store
from wrapq.engine.calibrate import float_root
from wrapq.engine.context import Run
from wrapq.errors import OutputError

_SHARE = 0.1
"""How much of the store one evaluation may take."""
_FASTEST = 1e8
"""Bytes a second: what is computed faster is not kept. Reading and checking them is about five times as fast."""


class FloatOutputs:
    """What the blocks of the float model give on each evaluation batch, as far as a store has it.

    Args:
        store: where it is kept.
        root: all that it depends on: model, data, code, versions, device class.
        windows: how many sequences there are in all batches.

    Attributes:
        hits: how many batches the store had.
        misses: how many it lacked.
        seconds: what running the float model on the former took when it was done.
        problem: why nothing more is written, or None.
    """

    def __init__(self, store: Store, root: Mapping[str, str], windows: int) -> None:
        self.store, self.windows = store, windows
        self.hits = self.misses = 0
        self.seconds = 0.0
        self.problem: str | None = None
        self._root = digest("float outputs", root)

    def get(self, batch: int) -> list[Tensor] | None:
        """The output [B, T, D] of each block on a batch, to the bit; None where the store lacks them."""
        if (stored := self.store.get(digest(self._root, batch))) is None:
            self.misses += 1
            return None
        self.hits, self.seconds = self.hits + 1, self.seconds + float(stored.facts["seconds"])
        return [stored.tensors[str(index)] for index in range(len(stored.tensors))]

    def keep(self, batch: int, outputs: Sequence[Tensor], seconds: float) -> None:
        """Store the output [B, T, D] of each block on a batch, for which the model ran so many seconds, if it is worth
        it.

        Never raises: a store that cannot be written costs later runs time, not this one its result.
        """
        size = sum(output.nbytes for output in outputs)
        total = size / len(outputs[0]) * self.windows
        if self.problem or total > _SHARE * self.store.limit or size > _FASTEST * seconds:
            return
        named = {str(index): output for index, output in enumerate(outputs)}
        facts = {"kind": "float model on evaluation data", "seconds": f"{seconds:.6f}"}
        try:
            self.store.put(digest(self._root, batch), named, facts)
        except OutputError as error:
            self.problem = str(error)


def float_outputs(run: Run, model: nn.Module, samples: Samples) -> FloatOutputs | None:
    """Those of a wrapped `model` on `samples`; None on a GPU, which computes them faster than a disk reads them, and
    where blocks are streamed or nothing is kept."""
    runtime, size = run.settings.runtime, run.plan.recipe.evaluation.batch_size
    if run.streaming or run.device.type != "cpu" or not runtime.cache_gb:
        return None
    root = float_root(run, model) | {"evaluation": samples.digest, "evaluation_batch_size": str(size)}
    store = Store(run.settings.paths.cache_folder(), runtime.cache_gb * 1e9)
    return FloatOutputs(store, root, len(samples.input_ids))


def tell_float_outputs(run: Run, known: FloatOutputs | None) -> None:
    """What a reader of the run should know of them."""
    if known is None:
        return
    figures = {"hits": known.hits, "misses": known.misses, "seconds_saved": known.seconds}
    run.tracker.metrics({f"cache/evaluation_{name}": value for name, value in figures.items()})
    if known.hits:
        what = f"what the float model gives on {known.hits} of {known.hits + known.misses} evaluation batches"
        run.note(f"{what} read from {known.store.folder}, which saved {known.seconds:.1f} s")
    if known.problem:
        run.note(f"what the float model gives is not kept for later runs: {known.problem}")
    known.store.collect()
