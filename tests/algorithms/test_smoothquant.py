"""SmoothQuant: the paper's formula, the function on every family, and what it is for: outliers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.algorithms.outliers import loss
from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import KINDS, build_model
from tests.graph.test_dataflow import weightless
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.algorithms.smoothquant import SmoothQuant, SmoothQuantOptions, input_steps, smoothed_error, smoothing
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics

NORMS = {"gpt2": 4, "opt": 4, "bert": 0, "mixtral": 2}
STATIC = "l: {match: {type: Linear}, weight: int8:channel, points: {input: int8:tensor:asym}}"
TAIL = "ranges: {algorithm: ranges}\nround: {algorithm: rtn}"


@pytest.mark.parametrize("feeds", ["norms", "all"])
@pytest.mark.parametrize("family", [*KINDS, "gemma3", "mixtral"])
def test_the_function_stays(family: str, feeds: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    smooth = SmoothQuant(SmoothQuantOptions(feeds=feeds))
    change, found = outputs_moved(model, [smooth], token_batches)
    assert 1e-9 < change < 1e-5 if found[0].names else found[0].skipped
    if feeds == "norms":
        assert len(found[0].names) == NORMS.get(family, 4)


@pytest.mark.parametrize("family", [*KINDS, "gemma3", "mixtral"])
def test_the_function_stays_folded_and_smoothed(family: str, token_batches: list[Tensor]) -> None:
    fold, smooth = FoldNorms(FoldOptions(untie=True)), SmoothQuant(SmoothQuantOptions(feeds="all"))
    change, _ = outputs_moved(build_model(family), [fold, smooth], token_batches)
    assert 1e-9 < change < 1e-5


def test_the_factors_are_those_of_the_paper(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    target, consumers = "model.layers.0.input_layernorm", ("q_proj", "k_proj", "v_proj")
    weights = [model.get_submodule(f"model.layers.0.self_attn.{r}").weight.detach().double() for r in consumers]
    x = torch.randn(50, 64) * torch.logspace(-2, 2, 64)
    gain = model.model.layers[0].input_layernorm.weight.detach().double()
    statistics = InputStatistics(("absmax",))
    statistics.add(x)
    rewriter = GraphRewriter(model, graph, smooth_specs(graph))
    names = SmoothQuant().inputs(graph, target)
    SmoothQuant(SmoothQuantOptions(alpha=0.7)).apply(rewriter, target, dict.fromkeys(names, statistics))
    largest = torch.cat(weights).abs().amax(0)
    factors = x.double().abs().amax(0) ** 0.7 / largest**0.3
    torch.testing.assert_close(model.model.layers[0].input_layernorm.weight.double(), gain / factors, rtol=1e-5, atol=0)
    for consumer, weight in zip(consumers, weights, strict=True):
        new = model.get_submodule(f"model.layers.0.self_attn.{consumer}").weight.double()
        torch.testing.assert_close(new, weight * factors, rtol=1e-5, atol=0)


def test_channels_of_zeros_are_left_alone() -> None:
    model = build_model("llama")
    graph = find_graph(model)
    target = "model.layers.0.input_layernorm"
    statistics = InputStatistics(("absmax",))
    statistics.add(torch.randn(9, 64) * (torch.arange(64) > 0))
    before = model.get_submodule(target).weight[0].item()
    rewriter = GraphRewriter(model, graph, smooth_specs(graph))
    SmoothQuant().apply(rewriter, target, dict.fromkeys(SmoothQuant().inputs(graph, target), statistics))
    assert model.get_submodule(target).weight[0].item() == before


def test_the_search_scores_what_quantizing_weights_and_inputs_does_to_the_outputs() -> None:
    model = build_model("llama")
    graph = find_graph(model)
    target, consumer = "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.up_proj"
    rewriter = GraphRewriter(model, graph, {consumer: smooth_specs(graph, "int8:channel", "int8:tensor:sym")[consumer]})
    smooth = SmoothQuant(SmoothQuantOptions(alpha="search"))
    x = torch.randn(400, 64) * torch.where(torch.arange(64) < 4, 100.0, 1.0)
    statistics = InputStatistics(smooth.needs)
    statistics.add(x)
    given = dict.fromkeys(smooth.inputs(graph, target), statistics)
    edge = graph.by_producer[target]
    weight = model.get_submodule(consumer).weight.detach()
    others = rewriter.consumer_weight(edge.consumers[0]).abs().amax(0).maximum(weight.abs().amax(0))
    scored = {}
    for alpha in (0.0, 0.5, 1.0):
        factors = smoothing(x.abs().amax(0), others, alpha, edge)
        rounded = fake(weight * factors, "int8:channel"), fake(x / factors, "int8:tensor:sym")
        measured = float((rounded[1] @ rounded[0].t() - x @ weight.t()).double().square().sum())
        scored[alpha] = smoothed_error(rewriter, edge, factors, given)
        assert scored[alpha] == pytest.approx(measured, rel=0.2)
    assert 0 < smooth.apply(rewriter, target, given)["alpha"] < 1
    assert scored[0.5] < 0.1 * scored[0.0]


def fake(x: Tensor, spec: str) -> Tensor:
    return observe_tensor(x, QuantSpec.parse(spec), "here").fake_quantize(x)


def test_the_step_of_an_input_is_that_of_its_largest_neighbour() -> None:
    largest = torch.tensor([1.0, 2.0, 3.0, 4.0])
    steps = {"int8:tensor": [4, 4, 4, 4], "int8:token:dyn": [4, 4, 4, 4], "int8:g2:sym:dyn": [2, 2, 4, 4]}
    for spec, expected in steps.items():
        assert input_steps(largest, QuantSpec.parse(spec)).tolist() == pytest.approx([x / 127.5 for x in expected])


def test_of_an_encoder_norms_are_refused_with_the_reason_and_attention_is_smoothed() -> None:
    graph = find_graph(weightless("bert"))
    found = SmoothQuant().find_targets(graph, smooth_specs(graph))
    assert not found.names
    assert found.skipped["bert.embeddings.LayerNorm"] == "its output is also seen by a sum"
    every = SmoothQuant(SmoothQuantOptions(feeds="all")).find_targets(graph, smooth_specs(graph))
    assert "bert.encoder.layer.0.attention.self.value" in every.names


def test_stages_with_rules_give_each_place_its_alpha(make_plan: MakePlan) -> None:  # noqa: F811
    rules = STATIC + "".join(
        f"\n{name}: {{match: {{name: '*.{where}.*_proj'}}, weight: int8:channel}}"
        for name, where in (("mlp", "mlp"), ("attn", "self_attn"))
    )
    stack = "a: {algorithm: smoothquant, alpha: 0.8, rules: [mlp]}\nb: {algorithm: smoothquant, rules: [attn]}\n"
    stages = make_plan(rules, stack + TAIL).stages[:2]
    assert [stage.options["alpha"] for stage in stages] == [0.8, 0.5]
    assert all("post_attention" in target for target in stages[0].targets)
    assert all("input_layernorm" in target for target in stages[1].targets)


@pytest.mark.parametrize(
    ("rules", "stack", "more", "what"),
    [
        (STATIC, "a: {algorithm: smoothquant}\nb: {algorithm: smoothquant}", "", "a and b would both scale the input"),
        (STATIC, "a: {algorithm: smoothquant}\nb: {algorithm: fold_norms}", "", "b: fold_norms cannot run there"),
        (STATIC, "a: {algorithm: smoothquant}", "stack_order: [ranges, a, round]\n", "name a before them"),
        (
            "l: {match: {type: Linear}, weight: int8:channel}",
            "a: {algorithm: smoothquant}",
            "",
            "smoothquant has nothing to do: no input of what reads it is quantized",
        ),
    ],
)
def test_stacks_that_cannot_work(rules: str, stack: str, more: str, what: str, refusal: object) -> None:  # noqa: F811
    assert what in refusal(rules, f"{stack}\n{TAIL}", more=more)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_outliers_cost_static_inputs_much_and_smoothed_ones_hardly(shared_models: Path, tmp_path: Path) -> None:
    assert loss("w8a8_static", shared_models, tmp_path) > 0.1
    assert loss("w8a8_smoothquant", shared_models, tmp_path) < 0.01
