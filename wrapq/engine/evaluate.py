"""Measuring a model on its own: a finished run's, or a float one."""

from __future__ import annotations

from pathlib import Path

from wrapq.data.sources.base import make_source
from wrapq.engine.host import use_machine
from wrapq.engine.measure import measure
from wrapq.engine.progress import Progress
from wrapq.engine.run_data import evaluation_samples, read_tokenizer
from wrapq.recipe.schema import Recipe, Settings
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.resolve import check_names
from wrapq.resolve.rules import Sources
from wrapq.runs.checkpoint import blaming_files, load, load_float, unique_tensors
from wrapq.runs.run_record import RunRecord


def evaluate(recipe: Recipe, settings: Settings, progress: Progress) -> tuple[dict[str, float], int]:
    """The quality of the model at `recipe.model.path` on the recipe's evaluation data, and its size in bytes; raises
    `WrapqError` when the path holds no model or the data cannot be read."""
    check_names(recipe, Sources({}))
    source = ModelSource(recipe.model, settings.runtime.trust_remote_code)
    config = recipe.evaluation
    tokenizer = read_tokenizer(source, [make_source(config.source, config.options)])
    _, samples = evaluation_samples(config, tokenizer, source.vocab_size)
    for text in samples.notes:
        progress.note(text)
    with use_machine(settings, recipe.seed) as device, blaming_files(Path(source.path)):
        with progress.task("Loading the model"):
            if not recipe.model.dequantize and RunRecord(Path(source.path)).has_model:
                model = load(source.path, device, trust_remote_code=settings.runtime.trust_remote_code)
            else:
                model = load_float(source, device)
        size = sum(t.numel() * t.itemsize for t in unique_tensors(model)[0].values())
        with progress.task("Measuring quality", -(-len(samples.input_ids) // config.batch_size), "batch") as advance:
            return measure(model, samples, config.batch_size, advance), size
