"""Rotations: the function stays on every family or the plan says why not, and outliers are gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.algorithms.outliers import loss
from tests.algorithms.transforming import outputs_moved
from tests.conftest import KINDS, build_model
from tests.graph.test_dataflow import weightless
from tests.models import random_model
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.algorithms.rotate import Rotate, RotateOptions
from wrapq.errors import ModelError
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.statistics.transport import transform_hessian

EVERY = (*KINDS, "gemma3", "mixtral", "qwen2_moe")
POST_NORMS = {"gemma2": 10, "gemma3": 10, "bert": 8}
"""Families whose norms write into the stream, and how many linears of two blocks read it."""
LINEAR = "l: {match: {type: Linear}, weight: int8:channel}"
TAIL = "round: {algorithm: rtn}"


def fold() -> FoldNorms:
    return FoldNorms(FoldOptions(untie=True))


@pytest.mark.parametrize("options", [{}, {"block": 16}, {"matrix": "orthogonal", "seed": 3}], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_the_function_stays(family: str, options: dict[str, object], token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change, found = outputs_moved(model, [fold(), Rotate(RotateOptions(**options))], token_batches)  # type: ignore[arg-type]
    assert 1e-9 < change < 1e-5
    # the values of two blocks, and the stream or all that read it
    assert len(found[1].names) == 2 + POST_NORMS.get(family, 1)
    wide = [
        name
        for name, tensor in before.items()
        if tensor.dim() > 1 and not torch.equal(tensor, model.state_dict()[name])
    ]
    assert len(wide) > (3 if family in POST_NORMS else 8)


@pytest.mark.parametrize("family", POST_NORMS)
def test_streams_that_norms_write_into_are_left_alone_with_the_reason(family: str) -> None:
    graph = find_graph(weightless(family))
    left = Rotate(RotateOptions(rotations=("R1",))).find_targets(graph, {}).skipped
    assert left
    assert all("norm" in reason for reason in left.values())


def test_a_stream_is_turned_as_the_paper_says(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph)
    for target in fold().find_targets(graph, {}).names:
        fold().apply(rewriter, target, {})
    rewriter.input_changes.clear()
    name = "model.layers.1.self_attn.k_proj"
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    model(token_batches[0])
    figures = Rotate().apply(rewriter, graph.streams[0].name, {})
    assert figures == {"writers": 5, "readers": 11}
    model(token_batches[0])
    (edit,) = rewriter.input_changes[name]
    torch.testing.assert_close(seen[1].double(), seen[0].double() @ edit.matrix, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    carried = transform_hessian(seen[0].t() @ seen[0], rewriter.input_changes[name])
    torch.testing.assert_close(carried, seen[1].t() @ seen[1], rtol=1e-3, atol=1e-3)


def test_heads_carry_their_hessians_along(token_batches: list[Tensor]) -> None:
    model = build_model("phi3")
    rewriter, seen = GraphRewriter(model, find_graph(model)), []
    name = "model.layers.0.self_attn.o_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    model(token_batches[0])
    Rotate().apply(rewriter, "model.layers.0.self_attn.qkv_proj", {})
    model(token_batches[0])
    assert float((seen[1] - seen[0]).norm() / seen[0].norm()) > 0.5
    carried = transform_hessian(seen[0].t() @ seen[0], rewriter.input_changes[name])
    torch.testing.assert_close(carried, seen[1].t() @ seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_all_can_be_undone(family: str) -> None:
    model = build_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewriter = GraphRewriter(model, find_graph(model))
    for transform in (fold(), Rotate()):
        for target in transform.find_targets(rewriter.graph, {}).names:
            transform.apply(rewriter, target, {})
    rewriter.undo_log.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(model.state_dict()) == set(before)


@pytest.mark.parametrize(("family", "what"), [("llama", "does more than normalize"), ("opt", "take its mean away")])
def test_the_rewriter_refuses_what_changes_the_function(family: str, what: str) -> None:
    model = build_model(family)
    rewriter = GraphRewriter(model, find_graph(model))
    if family == "opt":
        for target in fold().find_targets(rewriter.graph, {}).names:
            for name in rewriter.graph.by_producer[target].consumers:
                rewriter.untie(name.module)
            fold().apply(rewriter, target, {})
    with pytest.raises(ModelError, match=what):
        rewriter.rotate_stream(rewriter.graph.streams[0], torch.arange(64)[None], torch.eye(64).double().flip(0) * -1)


def test_the_plan_shows_what_will_be_turned(make_plan: MakePlan) -> None:  # noqa: F811
    plan = make_plan(LINEAR, f"fold: {{algorithm: fold_norms}}\nturn: {{algorithm: rotate}}\n{TAIL}")
    assert plan.stages[1].targets[0] == "model.layers.0.self_attn.v_proj"
    assert plan.stages[1].targets[-1] == "model.embed_tokens"
    assert not plan.needs_calibration


@pytest.mark.parametrize(
    ("stack", "what"),
    [
        ("turn: {algorithm: rotate}", "and no fold_norms before it folds model.layers.0.input_layernorm"),
        (
            "fold: {algorithm: fold_norms}\nawq: {algorithm: awq}\nturn: {algorithm: rotate}",
            "rotate cannot run there: it needs norms that only normalize, and a stage before it scaled",
        ),
        ("turn: {algorithm: rotate, rotations: [R5]}", "R5"),
    ],
)
def test_stacks_that_cannot_work(stack: str, what: str, refusal: object) -> None:  # noqa: F811
    assert what in refusal(LINEAR, f"{stack}\n{TAIL}")  # type: ignore[operator]


def test_values_alone_need_no_folding(make_plan: MakePlan) -> None:  # noqa: F811
    plan = make_plan(LINEAR, f"turn: {{algorithm: rotate, rotations: [R2]}}\n{TAIL}")
    assert all(target.endswith("v_proj") for target in plan.stages[0].targets)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_norms_are_folded_only_where_a_rotation_needs_it(
    family: str,
    make_plan: MakePlan,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = ("model=hf", f"model.path={random_model(family, tmp_path / family, tie_word_embeddings=False)}")
    fold, turn = "fold: {algorithm: fold_norms, untie: true}", "turn: {algorithm: rotate}"
    alone, rotated = (make_plan(LINEAR, "\n".join([*stack, TAIL]), *model) for stack in ([fold], [fold, turn]))
    heads = make_plan(LINEAR, f"{fold}\nturn: {{algorithm: rotate, rotations: [R2]}}\n{TAIL}", *model)
    assert len(alone.stages[0].targets) == 5 and heads.stages[0].targets == ()
    assert len(rotated.stages[0].targets) == (5 if family == "llama" else 0)
    assert any("no rotation needs it folded" in note for note in rotated.notes) == (family == "gemma2")
    assert bool(rotated.stages[1].online) == (family == "gemma2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_outliers_cost_static_inputs_hardly_anything_once_turned(shared_models: Path, tmp_path: Path) -> None:
    turn = ["+algorithm@stack.fold=fold_norms", "+algorithm@stack.turn=rotate", "stack.fold.untie=true"]
    turn += ["stack.turn.rotations=[R1,R2,R4]"]
    plain = ["~stack.smooth", "algorithm@stack.round=rtn"]
    assert loss("w8a8_static", shared_models, tmp_path, *plain) > 0.1
    assert loss("w8a8_static", shared_models, tmp_path, *plain, *turn) < 0.01
