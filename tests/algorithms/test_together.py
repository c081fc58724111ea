"""Fold, rotate and smooth, one after the other as a stack runs them: the function stays on every family."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import KINDS, build_model
from wrapq.algorithms.awq import AWQ
from wrapq.algorithms.cle import CLE
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.algorithms.rotate import Rotate, RotateOptions
from wrapq.algorithms.smoothquant import SmoothQuant, SmoothQuantOptions
from wrapq.algorithms.transform import Transform
from wrapq.graph.dataflow import find_graph
from wrapq.resolve.transforms import Transforms

EVERY = (*KINDS, "gemma3", "mixtral", "qwen2_moe")
ALL = SmoothQuantOptions(feeds="all")


def stack(name: str) -> list[Transform]:
    fold, turn = FoldNorms(FoldOptions(untie=True)), Rotate(RotateOptions(rotations=("R1", "R2", "R4")))
    return {
        "fold, rotate, smooth": [fold, turn, SmoothQuant(SmoothQuantOptions(feeds="online"))],
        "fold, smooth, turn online": [fold, SmoothQuant(ALL), Rotate(RotateOptions(rotations=("R4",)))],
        "cle, fold, rotate, awq": [CLE(), fold, Rotate(), AWQ()],
    }[name]


@pytest.mark.parametrize("name", ["fold, rotate, smooth", "fold, smooth, turn online", "cle, fold, rotate, awq"])
@pytest.mark.parametrize("family", EVERY)
def test_the_function_stays(family: str, name: str, token_batches: list[Tensor]) -> None:
    plan, transforms = Transforms(model := build_model(family), smooth_specs(find_graph(model))), stack(name)
    problems = [problem for t in transforms for problem in plan.plan(type(t).__name__, "it", t, ())[2]]
    assert not any("would change the input" in problem.what for problem in problems)
    change, found = outputs_moved(model, transforms, token_batches)
    assert 1e-9 < change < 2e-5
    for transform, targets in zip(transforms, found, strict=True):
        assert targets.names or targets.skipped, f"{type(transform).__name__} neither does anything nor says why"
