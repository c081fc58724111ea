"""A learned rotation is orthogonal, goes downhill, keeps what it must, and is the same each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.algorithms.transforming import outputs_moved
from tests.conftest import build_model
from tests.resolve.conftest import MakePlan, make_plan  # noqa: F401
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.algorithms.learned_rotation import cayley_step, learn_rotation
from wrapq.algorithms.rotate import Rotate, RotateOptions
from wrapq.calibration.forward import Batch
from wrapq.calibration.graph import find_graph
from wrapq.calibration.surgery import Surgeon
from wrapq.errors import CalibrationError
from wrapq.quant.hadamard import around_ones, rotation
from wrapq.quant.spec import QuantSpec

POINTS = {"weight": QuantSpec.parse("int4:channel"), "input": QuantSpec.parse("int4:token:dyn")}


def folded(family: str, batches: list[Tensor]) -> Surgeon:
    model = build_model(family)
    graph = find_graph(model)
    specs = {name: POINTS for name in graph.linears if "head" not in name}
    surgeon, fold = Surgeon(model, graph, specs), FoldNorms(FoldOptions(untie=True))
    for target in fold.find(graph, specs).targets:
        fold.apply(surgeon, target, {})
    surgeon.batches = [Batch({"input_ids": ids, "use_cache": False}) for ids in batches]
    return surgeon


@pytest.mark.parametrize("keep_ones", [False, True])
def test_a_step_is_that_of_the_paper_and_stays_orthogonal(keep_ones: bool) -> None:
    start = around_ones(12, "hadamard", 0) if keep_ones else rotation(12, "hadamard", 0)
    gradient = torch.randn(12, 12, dtype=torch.double)
    moved = cayley_step(start, gradient, 0.5, keep_ones)
    torch.testing.assert_close(moved @ moved.t(), torch.eye(12, dtype=torch.double), rtol=0, atol=1e-12)
    ones = torch.ones(12, dtype=torch.double)
    if keep_ones:
        torch.testing.assert_close(ones @ moved, ones, rtol=0, atol=1e-12)
        return
    skew = gradient @ start.t() - start @ gradient.t()  # equation 3 of SpinQuant
    half, eye = 0.5 / skew.norm() / 2 * skew, torch.eye(12, dtype=torch.double)
    torch.testing.assert_close(moved, torch.linalg.inv(eye + half) @ (eye - half) @ start)
    assert float(((moved - start) * gradient).sum()) < 0  # downhill


def test_the_loss_falls_and_the_function_stays(token_batches: list[Tensor]) -> None:
    losses = []
    for family in ("llama", "opt", "phi3"):
        surgeon = folded(family, token_batches)
        stream = surgeon.graph.streams[0]
        before = surgeon.model(token_batches[0]).logits
        figures = Rotate(RotateOptions(rotations=("R1",), learn=40)).apply(surgeon, stream.name, {})
        losses.append((figures["loss_before"], figures["loss_after"]))
        torch.testing.assert_close(surgeon.model(token_batches[0]).logits, before, rtol=1e-3, atol=1e-4)
        assert not any(module._forward_pre_hooks for module in surgeon.model.modules())
    # where nothing better is found in so few steps, the start is kept
    assert all(after <= before for before, after in losses)
    assert sum(after < 0.98 * before for before, after in losses) >= 2


def test_it_is_the_same_each_time_and_follows_its_blocks(token_batches: list[Tensor]) -> None:
    blocks, start = torch.arange(64).reshape(4, 16), rotation(16, "hadamard", 0)
    found = []
    for _ in range(2):
        surgeon = folded("phi3", token_batches)
        found.append(learn_rotation(surgeon, surgeon.graph.streams[0], blocks, start, False, 20))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][0].shape == (16, 16)


def test_without_data_it_is_refused(token_batches: list[Tensor]) -> None:
    surgeon = folded("llama", token_batches)
    surgeon.batches = ()
    with pytest.raises(CalibrationError, match="learned from calibration data"):
        Rotate(RotateOptions(learn=2)).apply(surgeon, surgeon.graph.streams[0].name, {})


def test_with_all_rotations_through_the_walk(token_batches: list[Tensor]) -> None:
    stack = [FoldNorms(FoldOptions(untie=True)), Rotate(RotateOptions(rotations=("R1", "R2", "R4"), learn=3))]
    change, found = outputs_moved(build_model("llama"), stack, token_batches)
    assert 1e-9 < change < 1e-4
    assert found[1].targets[-1] == "model.embed_tokens"  # learned with the others in place


def test_the_plan_asks_for_calibration_data(make_plan: MakePlan) -> None:  # noqa: F811
    rules = "l: {match: {type: Linear}, weight: int8:channel}"
    stack = "fold: {algorithm: fold_norms}\nturn: {algorithm: rotate, learn: LEARN}\nround: {algorithm: rtn}"
    assert make_plan(rules, stack.replace("LEARN", "5")).needs_calibration
    assert not make_plan(rules, stack.replace("LEARN", "0")).needs_calibration
