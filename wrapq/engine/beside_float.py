"""What the float model does in the runtime of an export: what the quantized one is measured beside."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wrapq.errors import WrapqError, reason_of
from wrapq.export.base import Exporter
from wrapq.metrics import FLOAT
from wrapq.recipe.schema import Settings
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.runs.checkpoint import load_float
from wrapq.runs.folder import RunFolder
from wrapq.runs.lock import code_digest, device_class, environment
from wrapq.statistics.cache import StoreUse, digest
from wrapq.statistics.store import Store

_TIMES = ("token_ms", "first_token_ms")


class FloatBeside:
    """Measures the float model in the runtimes of exports, once on a machine for each model, runtime and length.

    Args:
        settings: where statistics are kept, and whether code that comes with the model may run.
        model: SHA-256 of the float model, in hex.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings, self.model = settings, model

    def figures(
        self, name: str, exporter: Exporter, plan: Plan, ids: Tensor, device: torch.device, export: Path
    ) -> tuple[dict[str, float], str]:
        """As `Reading.measured`, and `size_mb`, of the float model that `plan` quantizes, exported by the `exporter` of
        the format `name` into a folder beside `export`, which does not stay; none, and why, where it cannot be done."""
        runtime = self.settings.runtime
        store = StoreUse(Store(self.settings.paths.cache_folder(), runtime.cache_gb * 1e9))
        where = [device_class(device), environment(), exporter.versions(), code_digest()]
        what = [self.model, plan.model.dtype, name, exporter.options.model_dump(), list(ids.shape)]
        key, start = digest("float model in a runtime", [*what, *where]), time.perf_counter()
        if runtime.cache_gb and (stored := store.store.get(key)) is not None:
            return {figure: float(value) for figure, value in stored.tensors.items()}, ""
        try:
            found = self._measure(exporter, plan, ids, device, export)
        except (WrapqError, OSError) as error:
            return {}, f"the float model is not measured beside it: {reason_of(error)}"
        if runtime.cache_gb:
            tensors = {figure: torch.tensor(value, dtype=torch.float64) for figure, value in found.items()}
            store.write(key, tensors, {"kind": "float model in a runtime"}, time.perf_counter() - start)
        return found, ""

    def _measure(
        self, exporter: Exporter, plan: Plan, ids: Tensor, device: torch.device, export: Path
    ) -> dict[str, float]:
        from transformers import AutoTokenizer

        nothing = plan.model_copy(update={"modules": (), "stages": ()})
        source = ModelSource(plan.recipe.model, self.settings.runtime.trust_remote_code)
        with tempfile.TemporaryDirectory(dir=export.parent, prefix=f".{FLOAT}-") as name:
            folder = RunFolder(Path(name))
            AutoTokenizer.from_pretrained(export, trust_remote_code=False).save_pretrained(name)
            exporter.export(load_float(source, device), nothing, folder)
            measured = exporter.read(folder.path, ids, str(device)).measured
            return {**measured, "size_mb": exporter.size(folder.path) / 1e6}


def with_float(figures: Mapping[str, float], floats: Mapping[str, float]) -> dict[str, float]:
    """The `figures` of an export with those of the float model in its runtime, and how many times as fast it is."""
    found = {**figures, **{f"{FLOAT}_{name}": value for name, value in floats.items()}}
    for name in _TIMES:
        if name in figures and name in floats:
            found[f"{name.removesuffix('_ms')}_speedup"] = floats[name] / figures[name]
    return found
