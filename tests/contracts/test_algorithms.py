"""What every algorithm declares, whichever its kind and its package."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.contracts.algorithm import variants
from wrapq.algorithms.base import BLOCK, PHASES, Algorithm
from wrapq.algorithms.transform import BATCHES
from wrapq.statistics.input import MODES, PARTS

EVERY = variants(Algorithm)
KNOWN = {*PARTS, *MODES, BATCHES, BLOCK}


@pytest.mark.parametrize("name", EVERY)
def test_phase_and_needs_are_known(name: str) -> None:
    algorithm = EVERY[name]
    assert algorithm.phase in PHASES
    assert algorithm.handles in ("weight", "activation", "model")
    assert set(algorithm.needs) <= KNOWN


@pytest.mark.parametrize("name", EVERY)
def test_options_are_described_checked_and_fixed(name: str) -> None:
    options = EVERY[name].options
    assert all(field.description and not field.is_required() for field in type(options).model_fields.values())
    with pytest.raises(ValidationError):
        type(options)(no_such_option=1)
    for key in type(options).model_fields:
        with pytest.raises(ValidationError):
            type(options)(**{key: object()})
        with pytest.raises(ValidationError):
            setattr(options, key, getattr(options, key))
