"""The contract of a transform: its skeleton works as it is written, and targets are those without a reason."""

from __future__ import annotations

import textwrap

import pytest
import torch
from pydantic import Field
from torch import Tensor

from tests.algorithms.transforming import outputs_moved
from tests.conftest import build_model
from wrapq.algorithms import scaling
from wrapq.algorithms.transform import PlannedTransform, Targets, Transform, scaled_targets
from wrapq.registry import Options, Registry


def skeleton() -> Transform:
    """The transform in the docstring, registered nowhere else."""
    lines = str(Transform.__doc__).partition("All there is to write:\n")[2].partition("\n    `unscalable`")[0]
    names = {"Transform": Transform, "Targets": Targets, "Options": Options, "Field": Field, **vars(scaling)}
    names["ALGORITHMS"] = Registry("algorithm", "wrapq.algorithms")
    exec(textwrap.dedent(lines), names)
    return names["Even"]()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_skeleton_in_the_docstring_keeps_the_function(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before = model.model.layers[0].input_layernorm.weight.detach().clone()
    change, (targets,) = outputs_moved(model, [skeleton()], token_batches)
    assert "model.layers.0.input_layernorm" in targets.names and 1e-9 < change < 1e-5
    assert not torch.allclose(model.model.layers[0].input_layernorm.weight, before, rtol=1e-2)


def test_names_with_a_reason_are_skipped_and_the_others_are_targets() -> None:
    targets = Targets.where_none({"a": None, "b": "it is tied to c", "d": None})
    assert targets == (("a", "d"), {"b": "it is tied to c"})


def test_only_transforms_that_scale_inputs_have_scaled_targets() -> None:
    even = skeleton()
    assert scaled_targets([PlannedTransform(even, ("a", "b"))]) == {"a", "b"}
    type(even).migrates = False
    assert scaled_targets([PlannedTransform(even, ("a", "b"))]) == frozenset()
