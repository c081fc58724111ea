"""The data of a run: what is calibrated on and what quality is measured on."""

from __future__ import annotations

from typing import Any

from wrapq.calibration.data import Samples, build_samples
from wrapq.calibration.sources.base import Source, make_source
from wrapq.resolve.plan import Plan


def calibration_samples(plan: Plan, tokenizer: Any) -> tuple[Source, Samples] | None:
    """The calibration data; None where no stage looks at any."""
    if not plan.needs_calibration:
        return None
    config = plan.recipe.calibration
    source = make_source(config.source, config.options)
    return source, build_samples(source, tokenizer, config.samples, config.seq_len, config.seed, config.pack)


def evaluation_samples(plan: Plan, tokenizer: Any) -> tuple[Source, Samples]:
    """The data on which quality is measured."""
    config = plan.recipe.evaluation
    source = make_source(config.source, config.options)
    windows = max(1, config.tokens // config.seq_len)
    return source, build_samples(source, tokenizer, windows, config.seq_len, seed=None)
