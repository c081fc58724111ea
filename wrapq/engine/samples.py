"""The data of a run: what is calibrated on and what quality is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from wrapq.calibration.data import Samples, build_samples
from wrapq.calibration.sources.base import Source, TokenSource, make_source
from wrapq.errors import ModelError
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import Plan


def sources_of(plan: Plan) -> list[Source]:
    """Where the data of a run comes from."""
    evaluation, calibration = plan.recipe.evaluation, plan.recipe.calibration
    sources = [make_source(evaluation.source, evaluation.options)]
    return [*sources, make_source(calibration.source, calibration.options)] if plan.needs_calibration else sources


def read_tokenizer(model: ModelSource, sources: Iterable[Source]) -> Any:
    """The model's tokenizer; None where it has none and all data is token ids already.

    Raises:
        ModelError: it cannot be read, and text needs it or the recipe names it.
    """
    try:
        return model.tokenizer()
    except ModelError:
        if model.config.tokenizer or not all(isinstance(source, TokenSource) for source in sources):
            raise
        return None


def calibration_samples(plan: Plan, tokenizer: Any, vocab_size: int | None) -> tuple[Source, Samples] | None:
    """The calibration data for a model of so many token ids; None where no stage looks at any."""
    if not plan.needs_calibration:
        return None
    config = plan.recipe.calibration
    source = make_source(config.source, config.options)
    size, seed = config.samples, config.seed
    return source, build_samples(source, tokenizer, size, config.seq_len, seed, config.pack, vocab_size)


def evaluation_samples(plan: Plan, tokenizer: Any, vocab_size: int | None) -> tuple[Source, Samples]:
    """The data on which quality is measured."""
    config = plan.recipe.evaluation
    source = make_source(config.source, config.options)
    windows = max(1, config.tokens // config.seq_len)
    return source, build_samples(source, tokenizer, windows, config.seq_len, seed=None, vocab_size=vocab_size)
