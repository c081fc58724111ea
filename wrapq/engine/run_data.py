"""The data of a run: calibration and evaluation samples, and the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from wrapq.data.samples import POOL, Samples, build_samples
from wrapq.data.sources.base import Source, TokenSource, make_source
from wrapq.engine.context import Run
from wrapq.errors import ModelError
from wrapq.recipe.schema import Evaluation
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan

_SHOWN = 6  # tokens of a sample


def read_data(run: Run) -> tuple[Samples | None, Samples]:
    """Read and record calibration samples (None where no stage needs data) and evaluation samples."""
    tokenizer = read_tokenizer(run.source, sources_of(run.plan))
    if tokenizer is None:
        run.note("the model has no tokenizer that can be read: none is saved with it")
    found: dict[str, Samples] = {}
    for context, source, samples in _samples(run.plan, tokenizer, run.source.vocab_size):
        for text in samples.notes:
            run.note(f"{context}: {text}")
        found[context], run.digests[context] = samples, samples.digest
        profile = {"tokens": samples.tokens, "windows": len(samples.input_ids), "seq_len": samples.input_ids.shape[1]}
        run.tracker.dataset(source.describe(), samples.digest, source.describe(), context, profile)
    calibration, evaluation = found.get("calibration"), found["evaluation"]
    if calibration is not None and torch.equal(calibration.input_ids, evaluation.input_ids):
        run.note("calibration and evaluation read the same tokens: the quality measured is too good")
    return calibration, evaluation


def sources_of(plan: Plan) -> list[Source]:
    """The data sources of a run."""
    evaluation, calibration = plan.recipe.evaluation, plan.recipe.calibration
    sources = [make_source(evaluation.source, evaluation.options)]
    return [*sources, make_source(calibration.source, calibration.options)] if plan.needs_calibration else sources


def read_tokenizer(model: ModelSource, sources: Iterable[Source]) -> Any:
    """The model's tokenizer, None where it has none and all data is token ids already; raises `ModelError` when it
    cannot be read, and text needs it or the recipe names it."""
    try:
        return model.tokenizer()
    except ModelError:
        if model.config.tokenizer or not all(isinstance(source, TokenSource) for source in sources):
            raise
        return None


def evaluation_samples(config: Evaluation, tokenizer: Any, vocab_size: int | None) -> tuple[Source, Samples]:
    """The evaluation source and samples, for a vocabulary of `vocab_size`."""
    source = make_source(config.source, config.options)
    windows = max(1, config.tokens // config.seq_len)
    length, score = config.seq_len, config.score
    return source, build_samples(source, tokenizer, windows, length, None, vocab_size=vocab_size, score=score)


def input_digests(plan: Plan, trust_remote_code: bool) -> dict[str, str]:
    """The digests of the model and the data of a run as they are now."""
    model = ModelSource(plan.recipe.model, trust_remote_code)
    samples = _samples(plan, read_tokenizer(model, sources_of(plan)), model.vocab_size)
    return {"model": model.digest()} | {context: found.digest for context, _, found in samples}


def preview_data(plan: Plan, trust_remote_code: bool) -> Iterator[str]:
    """What the data of a run gives, and what of it is cut, for calibration and evaluation; raises as `read_data` does.

    No more is read than there are samples, where a run chooses among more.
    """
    model = ModelSource(plan.recipe.model, trust_remote_code)
    tokenizer = read_tokenizer(model, sources_of(plan))
    for context, source, samples in _samples(plan, tokenizer, model.vocab_size, choose=False):
        count, length = samples.input_ids.shape
        first = samples.input_ids[0, :_SHOWN].tolist()
        shown = ", ".join(repr(tokenizer.decode([i])) if tokenizer is not None else str(i) for i in first)
        yield f"{context}: {count} samples of {length} tokens from {source.describe()}, the first begins {shown}"
        told = [str(samples.read)]
        if context == "calibration" and not samples.read.whole:
            told.append(f"a run draws {count:,} of at most {count * POOL:,}")
        if samples.scored is not None:
            told.append(f"{int(samples.scored.sum()):,} tokens scored")
        yield f"{context}: {'; '.join(told)}"
        yield from (f"note: {context}: {text}" for text in samples.notes)


def _samples(
    plan: Plan, tokenizer: Any, vocab_size: int | None, choose: bool = True
) -> Iterator[tuple[str, Source, Samples]]:
    """`calibration` where a stage needs data, and `evaluation`, each with its source and its samples; without `choose`
    the first ones."""
    if plan.needs_calibration:
        config = plan.recipe.calibration
        source = make_source(config.source, config.options)
        length, seed = config.seq_len, config.seed if choose else None
        samples = build_samples(source, tokenizer, config.samples, length, seed, config.pack, vocab_size)
        yield "calibration", source, samples
    yield "evaluation", *evaluation_samples(plan.recipe.evaluation, tokenizer, vocab_size)
