"""SmoothQuant: the paper's formula, the function on every family, and what it is for: outliers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.algorithms.outliers import loss
from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import KINDS, build_model
from tests.graph.test_dataflow import weightless
from tests.models import random_model
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq import PTQConfig
from wrapq.algorithms.fold_norms import FoldNorms, FoldOptions
from wrapq.algorithms.smoothquant import SmoothQuant, SmoothQuantOptions, smoothed_error, smoothing
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import make_observer
from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics

NORMS = {"gpt2": 4, "opt": 4, "bert": 0, "mixtral": 2}
STATIC = "l: {match: {type: Linear}, weight: int8:channel, points: {input: int8:tensor:asym}}"
TAIL = "ranges: {algorithm: ranges}\nround: {algorithm: rtn}"


@pytest.mark.parametrize("feeds", ["norms", "all", "online"])
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
    smooth = SmoothQuant(SmoothQuantOptions(alpha=0.5))
    smooth.apply(rewriter, target, dict.fromkeys(smooth.inputs(graph, target), statistics))
    assert model.get_submodule(target).weight[0].item() == before


@pytest.mark.parametrize("given", ["int8:tensor:sym", "int8:tensor:asym", "int8:token:dyn", "fp8_e4m3:tensor"])
def test_the_search_scores_what_quantizing_weights_and_inputs_does_to_the_outputs(given: str) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    target, consumer = "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.up_proj"
    rewriter = GraphRewriter(model, graph, {consumer: smooth_specs(graph, "int8:channel", given)[consumer]})
    smooth = SmoothQuant(SmoothQuantOptions(alpha="search"))
    x = torch.randn(400, 64) * torch.where(torch.arange(64) < 4, 100.0, 1.0)
    statistics = InputStatistics(smooth.needs)
    statistics.add(x)
    reached = dict.fromkeys(smooth.inputs(graph, target), statistics)
    edge = graph.by_producer[target]
    weight = model.get_submodule(consumer).weight.detach().clone()
    largest = torch.stack([rewriter.consumer_weight(each).abs().amax(0) for each in edge.consumers]).amax(0)
    scored = {}
    for alpha in (0.0, 0.5, 1.0):
        factors = smoothing(x.abs().amax(0), largest, alpha, edge)
        rounded = fake(weight * factors, "int8:channel"), fake(x / factors, given)
        measured = float((rounded[1] @ rounded[0].t() - x @ weight.t()).double().square().sum())
        scored[alpha] = smoothed_error(rewriter, edge, factors, reached)
        assert scored[alpha] == pytest.approx(measured, rel=0.02)
    before = smoothed_error(rewriter, edge, torch.ones(64), reached)
    figures = smooth.apply(rewriter, target, reached)
    assert figures["error"] <= min([1.0, *(error / before for error in scored.values())])
    if given != "fp8_e4m3:tensor":  # whose steps follow the numbers
        assert figures["error"] < 0.2


def fake(x: Tensor, spec: str) -> Tensor:
    parsed = QuantSpec.parse(spec)
    if parsed.dynamic:
        return dynamic_fake_quantize(x, parsed)
    observer = make_observer(parsed)
    observer.update(x)
    return observer.qparams("here").fake_quantize(x)


@pytest.mark.parametrize("feeds", ["norms", "online"])
def test_a_place_that_loses_nothing_is_left_to_the_bit(feeds: str) -> None:
    model = build_model("llama")
    graph = find_graph(model)
    smooth = SmoothQuant(SmoothQuantOptions(feeds=feeds))
    target = "model.layers.0.input_layernorm" if feeds == "norms" else "model.layers.0.self_attn.q_proj.input"
    x = (torch.arange(200 * 64).reshape(200, 64) % 256 - 128).float()
    statistics = InputStatistics(smooth.needs)
    statistics.add(x)
    with torch.no_grad():
        for name in smooth.inputs(graph, target):
            weight = model.get_submodule(name).weight
            weight.copy_(torch.randint(-127, 128, weight.shape)).view(-1)[:: weight.shape[1]] = 127
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, "int8:channel", "int8:tensor:asym"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figures = smooth.apply(rewriter, target, dict.fromkeys(smooth.inputs(graph, target), statistics))
    assert (figures["error"], figures["largest_factor"]) == (1, 1)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_what_nothing_can_take_the_inverse_of_is_divided_at_the_own_input() -> None:
    graph = find_graph(weightless("bert"))
    smooth = SmoothQuant(SmoothQuantOptions(feeds="online"))
    found = smooth.find_targets(graph, smooth_specs(graph))
    layer = "bert.encoder.layer.0"
    own = [f"{layer}.{name}.input" for name in ("attention.self.query", "intermediate.dense", "output.dense")]
    assert [name for name in found.names if name.startswith(layer)] == [f"{layer}.attention.self.value", *own]
    assert not [name for name in found.skipped if name.startswith(layer)]
    heads = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
    assert smooth.online(graph, own[:1]) == smooth.inputs(graph, own[0]) == tuple(heads)


def test_where_all_can_be_folded_nothing_is_divided_at_each_forward() -> None:
    graph = find_graph(weightless("llama"))
    names = [
        SmoothQuant(SmoothQuantOptions(feeds=feeds)).find_targets(graph, smooth_specs(graph)).names
        for feeds in ("all", "online")
    ]
    assert names[0] == names[1]


def test_of_an_encoder_in_8_bits_half_of_the_error_is_left(token_batches: list[Tensor]) -> None:
    """Outliers behind the norms, as trained encoders have them, which the norms cannot give away."""
    model = build_model("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter[:3] *= 30
    expected = hidden(model, token_batches)
    errors = {}
    for feeds in ("all", "online"):
        config = PTQConfig(overrides={"*LayerNorm": None, "*embeddings": None, "*predictions*": None})
        prepared = wrapq.prepare(copy.deepcopy(model), config)
        stack = {"smooth": {"algorithm": "smoothquant", "feeds": feeds}, "round": "rtn"}
        wrapq.calibrate(prepared, [{"input_ids": ids} for ids in token_batches], stack)
        fake_quantized = hidden(prepared, token_batches)
        converted = wrapq.convert(prepared)
        assert torch.equal(hidden(converted, token_batches), fake_quantized)
        assert ("bert.encoder.layer.0.output.dense.smoothing.factors" in converted.state_dict()) == (feeds == "online")
        errors[feeds] = float((fake_quantized - expected).norm())
    assert errors["online"] < 0.6 * errors["all"]


def test_a_run_saves_what_divides_inputs_and_loads_it_again(tmp_path: Path) -> None:
    """The outputs of what is loaded are compared to the bit before the run ends."""
    data = ["calibration.samples=2", "calibration.seq_len=32", "evaluation.tokens=128", "evaluation.seq_len=32"]
    model = ["model=hf", f"model.path={random_model('gpt2', tmp_path / 'gpt2')}"]
    result = wrapq.run("w8a8_smoothquant", [*model, *data, "tracking=none", f"paths.outputs={tmp_path}"])
    loaded: Any = wrapq.load(result.folder)
    assert loaded.transformer.h[1].mlp.c_proj.smoothing.factors.shape == (256,)
    assert "online" in (result.folder / "recipe.yaml").read_text()


@torch.no_grad()
def hidden(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model.bert(ids)[0].flatten() for ids in batches])


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
    assert [stage.options["alpha"] for stage in stages] == [0.8, "search"]
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
    plain = ["~stack.smooth", "algorithm@stack.round=rtn"]
    assert loss("w8a8_static", shared_models, tmp_path, *plain) > 0.1
    assert loss("w8a8_static", shared_models, tmp_path) < 0.01
    assert loss("w8a8_smoothquant", shared_models, tmp_path) < 0.01
