"""Folding norms: nothing is left in them, the function stays, on every family or with the reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import build_model
from tests.graph.test_dataflow import weightless
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq import PTQConfig, calibrate, load, prepare
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.graph.dataflow import find_graph
from wrapq.graph.norms import norm_gain
from wrapq.graph.rewriter import GraphRewriter

FOLDED = {"llama": 5, "qwen2": 5, "qwen3": 5, "mistral": 5, "gemma2": 5, "gemma3": 5, "phi3": 5, "gpt2": 5, "opt": 5}
FOLDED |= {"bert": 2, "mixtral": 5, "qwen2_moe": 5}
STACK = "fold: {algorithm: fold_norms}\nround: {algorithm: rtn}"
LINEAR = "l: {match: {type: Linear}, weight: int8:channel}"


@pytest.mark.parametrize("family", FOLDED)
def test_the_function_stays(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    expected = model(token_batches[0]).logits.double()
    fold = FoldNorms(FoldOptions(untie=True))
    rewriter = GraphRewriter(model, find_graph(model))
    found = fold.find_targets(find_graph(weightless(family)), {})
    assert len(found.names) == FOLDED[family]
    for target in found.names:
        fold.apply(rewriter, target, {})
        norm = model.get_submodule(target)
        assert bool((norm_gain(norm, target) == 1).all())
        assert norm._parameters.get("bias") is None or not norm.bias.any()
    after = model(token_batches[0]).logits
    assert float((after - expected).norm() / expected.norm()) < 1e-5
    assert not model.config.tie_word_embeddings


def test_tied_heads_are_left_alone_unless_asked_for() -> None:
    graph = find_graph(weightless("gemma2"))
    found = FoldNorms().find_targets(graph, {})
    assert len(found.names) == 4
    assert found.skipped["model.norm"].startswith("lm_head is tied to model.embed_tokens")


def test_of_an_encoder_only_the_last_norms_can_be_folded() -> None:
    found = FoldNorms().find_targets(find_graph(weightless("bert")), {})
    assert found.names == ("bert.encoder.layer.1.output.LayerNorm",)
    assert found.skipped["bert.embeddings.LayerNorm"] == "its output is also seen by a sum"


def test_the_plan_shows_what_will_be_folded(make_plan: MakePlan) -> None:  # noqa: F811
    plan = make_plan(LINEAR, STACK)
    stage = plan.stages[0]
    assert (stage.phase, len(stage.targets), stage.targets[-1]) == ("transform", 9, "model.norm")
    assert not plan.needs_calibration
    assert plan.digest() != make_plan(LINEAR).digest()


def test_rules_choose_the_places(make_plan: MakePlan) -> None:  # noqa: F811
    rules = "mlp: {match: {name: '*.up_proj'}, weight: int8:channel}"
    stack = "fold: {algorithm: fold_norms, rules: [mlp]}\nround: {algorithm: rtn}"
    assert {t.rpartition(".")[2] for t in make_plan(rules, stack).stages[0].targets} == {"post_attention_layernorm"}


@pytest.mark.parametrize(
    ("rules", "stack", "more", "what"),
    [
        (
            "none: {match: {name: '*.down_proj'}, weight: int8:channel}",
            "fold: {algorithm: fold_norms, rules: [none]}\nround: {algorithm: rtn}",
            "",
            "fold_norms has nothing to do: the model has no place for it\n    remove the stage with ~stack.fold",
        ),
        (LINEAR, STACK, "stack_order: [round, fold]\n", "fold changes the float model, in which the stages before it"),
    ],
)
def test_stacks_that_cannot_work(rules: str, stack: str, more: str, what: str, refusal: object) -> None:  # noqa: F811
    assert what in refusal(rules, stack, more=more)  # type: ignore[operator]


def test_a_fold_of_which_a_rotation_needs_nothing_is_no_mistake() -> None:
    """The norms of an encoder write into the stream: R1 rotates what reads it, and there is nothing to fold."""
    model = prepare(build_model("bert"), PTQConfig(weight="int8:channel", activation=None))
    batches = [{"input_ids": torch.arange(3, 19)[None]}]
    report = calibrate(model, batches, {"fold": "fold_norms", "rotate": "rotate", "round": "rtn"})
    assert not report.transforms["fold"] and report.transforms["rotate"]


def test_a_run_folds_saves_and_loads(make_plan: MakePlan, tmp_path: Path) -> None:  # noqa: F811
    from wrapq.engine.progress import Progress
    from wrapq.engine.run import run

    make_plan(LINEAR, STACK)  # writes the recipe
    small = ["evaluation.tokens=256", "evaluation.seq_len=64", "tracking=none", f"paths.outputs={tmp_path}/out"]
    result = run("./mine.yaml", small, Progress())
    assert result is not None
    model = load(result.folder)
    assert all(bool((m.weight == 1).all()) for n, m in model.named_modules() if n.endswith("norm"))
    assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()
