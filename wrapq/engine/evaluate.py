"""Measuring a model on its own: a finished run's, or a float one."""

from __future__ import annotations

from pathlib import Path

import torch

from wrapq.calibration.data import build_samples
from wrapq.calibration.sources.base import make_source
from wrapq.engine.checkpoint import MANIFEST, load
from wrapq.engine.measure import measure
from wrapq.engine.progress import Progress
from wrapq.engine.run import use_machine
from wrapq.engine.samples import read_tokenizer
from wrapq.recipe.schema import Recipe, Settings
from wrapq.resolve.model import ModelSource
from wrapq.resolve.resolve import check_names
from wrapq.resolve.rules import Sources


def evaluate(recipe: Recipe, settings: Settings, progress: Progress) -> tuple[dict[str, float], int]:
    """The quality of the model at `recipe.model.path` on the recipe's evaluation data, and its size in bytes.

    Raises:
        WrapqError: the path holds no model, the data cannot be read.
    """
    check_names(recipe, Sources({}))
    source = ModelSource(recipe.model, settings.runtime.trust_remote_code)
    device, config = use_machine(settings, recipe.seed), recipe.evaluation
    data = make_source(config.source, config.options)
    windows = max(1, config.tokens // config.seq_len)
    samples = build_samples(
        data, read_tokenizer(source, [data]), windows, config.seq_len, seed=None, vocab_size=source.vocab_size
    )
    finished = (Path(source.path) / MANIFEST).is_file()
    with progress.task("Loading the model"):
        model = load(source.path, device) if finished else source.load(device)
    size = sum(t.numel() * t.itemsize for t in unique_tensors(model))
    with progress.task("Measuring quality", -(-windows // config.batch_size), "batch") as advance:
        return measure(model, samples, config.batch_size, advance), size


def unique_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, tied ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return list({(t.data_ptr(), t.shape): t for t in tensors}.values())
