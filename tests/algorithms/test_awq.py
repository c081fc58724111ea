"""AWQ: the scales that the paper's search finds by running the layer, found from the Hessian; the function stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import KINDS, build_model
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq import run
from wrapq.algorithms.awq import AWQ, AWQOptions, awq_error
from wrapq.calibration.processes import Processes
from wrapq.engine.apply_transforms import apply_transform
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.statistics.input import InputStatistics
from wrapq.wrappers.model import Specs

TARGET, READERS = "model.layers.0.input_layernorm", ("q_proj", "k_proj", "v_proj")
W4 = "l: {match: {type: Linear}, weight: 'int4:g64:sym'}\nhead: {match: {name: lm_head}, quantize: false}"


@pytest.mark.parametrize("family", [*KINDS, "gemma3", "mixtral"])
def test_the_function_stays(family: str, token_batches: list[Tensor]) -> None:
    change, found = outputs_moved(build_model(family), [AWQ(AWQOptions(grid=4))], token_batches, "int4:g16:sym")
    assert found[0].names
    assert 1e-9 < change < 1e-5


def rounded(weight: Tensor, size: int) -> Tensor:
    """Nearest of 16 levels, 7.5 steps to a side, in groups of `size`; float64."""
    parts = weight.unflatten(1, (-1, size))
    scale = parts.abs().amax(-1, keepdim=True) / 7.5
    return ((parts / scale).round().clamp(-8, 7) * scale).flatten(1)


def tried(x: Tensor, weights: list[Tensor], duo: bool) -> list[tuple[Tensor, float]]:
    """AutoAWQ's search, transcribed: scales, and their error on the rows of `x` themselves; float64."""
    x_mean = x.abs().mean(0)
    parts = torch.stack([w.abs().unflatten(1, (-1, 16)) for w in weights])
    w_mean = torch.stack([(p / p.amax(-1, keepdim=True)).flatten(1).mean(0) for p in parts]).mean(0)
    found = []
    for ratio in [step / 20 for step in range(20)]:
        for form in [x_mean**ratio] + ([x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4)] if duo else []):
            s = form.clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            found.append((s, cost(x, weights, s)))
    return found


def cost(x: Tensor, weights: list[Tensor], s: Tensor) -> float:
    errors = [(x / s) @ rounded(w * s, 16).t() - x @ w.t() for w in weights]
    return sum(float(error.square().sum()) for error in errors)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_own_inputs_are_scaled_where_that_is_asked_for(family: str, token_batches: list[Tensor]) -> None:
    change, found = outputs_moved(build_model(family), [AWQ(AWQOptions(online=True))], token_batches, "int4:g16:sym")
    assert 1e-9 < change < 1e-5
    assert any(name.endswith(".input") for name in found[0].names)
    assert not any(name.endswith(".input") for name in AWQ().find_targets(*graph_and_specs(family)).names)


def graph_and_specs(family: str) -> tuple[Graph, Specs]:
    graph = find_graph(build_model(family))
    return graph, smooth_specs(graph, "int4:g16:sym")


@pytest.mark.parametrize("duo", [False, True])
def test_the_scales_are_those_of_a_search_that_runs_the_layer(duo: bool) -> None:
    model = build_model("llama", num_key_value_heads=4).double()
    graph = find_graph(model)
    edge = graph.by_producer[TARGET]
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, "int4:g16:sym", None))
    modules = [model.get_submodule(f"model.layers.0.self_attn.{r}") for r in READERS]
    weights = [module.weight.detach().clone() for module in modules]
    x = torch.randn(300, 64, dtype=torch.float64) * torch.logspace(-1, 1, 64, dtype=torch.float64)
    x = x + x[:, :1]
    awq = AWQ(AWQOptions(duo=duo))
    statistics = InputStatistics((*awq.needs, "float64"))
    statistics.add(x)
    given = dict.fromkeys(awq.inputs(graph, TARGET), statistics)
    expected = tried(x, weights, duo)
    for ours, (scales, error) in zip(awq.candidates(rewriter, edge, given), expected, strict=True):
        torch.testing.assert_close(ours.double(), scales, rtol=1e-5, atol=0)
        assert awq_error(rewriter, edge, ours.float(), given) == pytest.approx(error, rel=1e-2)
    awq.apply(rewriter, TARGET, given)
    chosen = (modules[0].weight.detach() / weights[0]).median(0).values
    least = min(error for _, error in expected)
    assert cost(x, weights, chosen) <= 1.01 * least < cost(x, weights, torch.ones_like(chosen))
    for module, weight in zip(modules, weights, strict=True):
        torch.testing.assert_close(module.weight.detach(), weight * chosen, rtol=1e-6, atol=0)


def test_weights_that_stay_float_are_left_alone(refusal: object) -> None:  # noqa: F811
    rules = "n: {match: {name: '*norm'}, weight: int8:tensor}"
    stack = "scale: {algorithm: awq}\nround: {algorithm: rtn}"
    what = "awq has nothing to do: no linear that reads it has a quantized weight"
    assert what in refusal(rules, stack)  # type: ignore[operator]


def test_awq_and_smoothquant_do_not_share_an_input(refusal: object) -> None:  # noqa: F811
    rules = "l: {match: {type: Linear}, weight: int4:channel, points: {input: int8:token:dyn}}"
    stack = "smooth: {algorithm: smoothquant}\nscale: {algorithm: awq}\nround: {algorithm: rtn}"
    assert "smooth and scale would both scale the input of" in refusal(rules, stack)  # type: ignore[operator]


@pytest.mark.slow
def test_runs_whose_scales_differ_share_no_statistics(tmp_path: Path) -> None:
    def notes(bits: int) -> str:
        more = [f"rules.linear.weight=int{bits}:g64:sym", "calibration.samples=2", "calibration.schedule=parallel"]
        more += ["stack.scale.grid=2", "algorithm@stack.round=gptq", "evaluation.tokens=256", "tracking=none"]
        result = run("w4a16_awq", [*more, f"paths.outputs={tmp_path}/out", f"paths.cache={tmp_path}/cache"])
        return (result.folder / "log.txt").read_text()

    assert "transform" in notes(4).lower()
    assert "read from" not in notes(3)
    assert "read from" in notes(4)


def test_the_plan_says_that_it_needs_data(make_plan: MakePlan) -> None:  # noqa: F811
    plan = make_plan(W4, "scale: {algorithm: awq}\nround: {algorithm: rtn}")
    assert plan.needs_calibration
    assert len(plan.stages[0].targets) == 16


class Joined(nn.Module):
    """A linear that reads what two others give, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.cat([self.one(x), self.two(x)], -1))


def test_the_second_of_two_feeds_of_an_input_sees_it_as_the_first_left_it() -> None:
    model, x, seen = Joined(), torch.randn(50, 4), {}

    class Watching(AWQ):
        def apply(
            self, rewriter: GraphRewriter, target: str, statistics: Mapping[str, InputStatistics]
        ) -> dict[str, float]:
            y = torch.cat([model.one(x), model.two(x)], -1).detach()
            seen[target] = statistics["both"].get("hessian", "both"), y.t() @ y
            rewriter.scale(rewriter.graph.by_producer[target], torch.tensor([1.0, 2.0, 3.0, 4.0]))
            return {}

    rewriter = GraphRewriter(model, find_graph(model, {"x": x}))
    apply_transform(rewriter, Watching(), ("one", "two"), [Batch({"x": x})], Processes())
    assert list(seen) == ["one", "two"]
    for found, expected in seen.values():
        torch.testing.assert_close(found, expected)
