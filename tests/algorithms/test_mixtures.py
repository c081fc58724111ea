"""AWQ and SmoothQuant on mixtures of experts: what each expert sees counts, and every one of them scales back."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.algorithms.test_awq import rounded
from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import build_model
from wrapq import PTQConfig
from wrapq.algorithms.awq import AWQ, AWQOptions, awq_error
from wrapq.algorithms.smoothquant import SmoothQuant, SmoothQuantOptions
from wrapq.algorithms.transform import Transform
from wrapq.calibration.float_pass import collect_statistics
from wrapq.calibration.processes import Processes
from wrapq.engine.apply_transforms import apply_transform
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.statistics.input import InputStatistics
from wrapq.statistics.transport import transform_statistics
from wrapq.wrappers.experts import put_together, take_apart

FIRST = "model.layers.0"
NORM, EXPERTS = f"{FIRST}.post_attention_layernorm", f"{FIRST}.mlp.experts"
SPECS = {"awq": ("int4:g16:sym", None), "smoothquant": ("int8:channel", "int8:tensor")}


def transforms() -> dict[str, Transform]:
    return {"awq": AWQ(AWQOptions(grid=4)), "smoothquant": SmoothQuant(SmoothQuantOptions(feeds="all"))}


def of_inputs(token_batches: list[Tensor]) -> list[Batch]:
    return [Batch({"input_ids": ids}) for ids in token_batches]


def with_outliers(model: nn.Module) -> nn.Module:
    """`model`, taken apart, with the same function and a few large channels wherever experts multiply them."""
    rewriter = GraphRewriter(take_apart(model), find_graph(model))
    for edge in rewriter.graph.edges:
        if any(".experts." in consumer.module for consumer in edge.consumers):
            rewriter.scale(edge, torch.where(torch.arange(edge.width) % 11 == 1, 1 / 30, 1.0))
    return model


def forget_expert(model: nn.Module, index: int = 0) -> None:
    """Let no token come to one expert of each layer of a Mixtral."""
    for layer in model.model.layers:  # the mean of others is never among the largest
        layer.mlp.gate.weight[index] = torch.cat(
            [layer.mlp.gate.weight[:index], layer.mlp.gate.weight[index + 1 :]]
        ).mean(0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "nemotron_h"])
def test_the_function_stays_and_every_expert_is_scaled(family: str, name: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    expected = model(token_batches[0], use_cache=False).logits
    apart = with_outliers(model)
    before = {key: tensor.clone() for key, tensor in apart.state_dict().items()}
    change, (found,) = outputs_moved(apart, [transforms()[name]], token_batches, SPECS[name][0])
    assert 1e-9 < change < 1e-5
    first = [key for key in before if ".experts." in key and "down_proj" not in key and key.endswith("weight")]
    assert first and not [key for key in first if torch.equal(apart.state_dict()[key], before[key])]
    gated = family in ("mixtral", "qwen2_moe")
    assert sum(".experts." in target for target in found.names) == (8 if gated else 0)
    whole = put_together(apart)(token_batches[0], use_cache=False).logits
    assert float((whole - expected).norm() / expected.norm()) < 1e-5


def routed(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All tokens [M, K] that come to the experts of the first layer, and those [M', K] of each, as the module of
    transformers is given them."""
    given: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, args: given.append(args[:2]))
    for ids in batches:
        model(ids)
    hook.remove()
    tokens, chosen = (torch.cat(parts) for parts in zip(*given, strict=True))
    return tokens, [tokens[(chosen == index).any(1)] for index in range(4)]


def cost(x: Tensor, weight: Tensor, s: Tensor) -> float:
    """The squared error of a linear on its rows, in float64 but for the scaled weight: the largest of each group lies
    halfway between two levels, where one more digit decides."""
    nearest = rounded(weight.float() * s.float(), 16).double() / s
    return float((x @ nearest.t() - x @ weight.t()).square().sum())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_error_is_the_sum_over_what_each_expert_is_given(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family).double()
    model.set_experts_implementation("eager")  # the only one in float64
    x, parts = routed(model, token_batches)
    fused = model.get_submodule(EXPERTS)
    pairs = [(part, weight.clone()) for part, weight in zip(parts, fused.gate_up_proj, strict=True)]
    if family == "qwen2_moe":
        shared = model.get_submodule(f"{FIRST}.mlp.shared_expert")
        pairs += [(x, part.weight.clone()) for part in (shared.gate_proj, shared.up_proj)]
        pairs += [(x, model.get_submodule(f"{FIRST}.mlp.shared_expert_gate").weight.clone())]
    pairs = [(part, weight) for part, weight in pairs if len(part)]
    errors: dict[float, float] = {}

    class Watching(AWQ):
        def apply(
            self, rewriter: GraphRewriter, target: str, statistics: Mapping[str, InputStatistics]
        ) -> dict[str, float]:
            edge = rewriter.graph.by_producer[target]
            magnitude = x.abs().mean(0)
            for step, ours in enumerate(self.candidates(rewriter, edge, statistics)):
                scales = magnitude ** (step / 20)
                scales = scales / (scales.max() * scales.min()).sqrt()
                torch.testing.assert_close(ours.double(), scales, rtol=1e-5, atol=0)
                errors[awq_error(rewriter, edge, ours.float(), statistics)] = sum(cost(*pair, ours) for pair in pairs)
            return dict(super().apply(rewriter, target, statistics))

    take_apart(model)
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, "int4:g16:sym", None))
    apply_transform(rewriter, Watching(AWQOptions(duo=False)), (NORM,), of_inputs(token_batches), Processes())
    assert len(errors) == 20
    for ours, expected in errors.items():
        assert ours == pytest.approx(expected, rel=1e-3)
    (factors,) = rewriter.input_changes[f"{EXPERTS}.3.up_proj"]
    chosen = sum(cost(*pair, factors.factors) for pair in pairs)
    assert chosen == pytest.approx(min(errors.values()), rel=1e-9)
    assert chosen < sum(cost(*pair, torch.ones(64)) for pair in pairs)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPECS)
def test_outliers_that_experts_read_cost_less(name: str, family: str, token_batches: list[Tensor]) -> None:
    stage = {"algorithm": name} | ({"feeds": "all"} if name == "smoothquant" else {})

    def loss(stack: Mapping[str, object]) -> float:
        model = put_together(with_outliers(build_model(family)))
        expected = model(token_batches[0]).logits
        weight, given = SPECS[name]
        points = {"weight": weight} | ({"input": given} if given else {})
        prepared = wrapq.prepare(model, PTQConfig(None, None, {"*.experts.*_proj": points}))
        wrapq.calibrate(prepared, [{"input_ids": ids} for ids in token_batches], stack, "parallel")  # type: ignore[arg-type]
        return float((wrapq.convert(prepared)(token_batches[0]).logits - expected).norm() / expected.norm())

    assert loss({"scale": stage, "round": "rtn"}) < 0.6 * loss({"round": "rtn"})


@pytest.mark.parametrize("name", SPECS)
def test_an_expert_without_tokens_counts_for_nothing_and_is_named(name: str, token_batches: list[Tensor]) -> None:
    model = build_model("mixtral", num_experts_per_tok=1)
    forget_expert(model)
    take_apart(model)
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, *SPECS[name]))
    expert, batches = model.get_submodule(f"{EXPERTS}.0"), of_inputs(token_batches)
    before, x = {key: tensor.clone() for key, tensor in expert.state_dict().items()}, torch.randn(5, 64)
    expected, transform = expert(x * model.get_submodule(NORM).weight), transforms()[name]
    figures = apply_transform(
        rewriter, transform, transform.find_targets(graph, rewriter.specs).names, batches, Processes()
    )
    assert NORM in figures and f"{EXPERTS}.1.up_proj" in figures and f"{EXPERTS}.0.up_proj" not in figures
    torch.testing.assert_close(expert.down_proj.weight, before["down_proj.weight"], rtol=0, atol=0)
    assert not torch.equal(expert.up_proj.weight, before["up_proj.weight"])  # for the norm that it reads is scaled
    torch.testing.assert_close(expert(x * model.get_submodule(NORM).weight), expected, rtol=1e-4, atol=1e-4)
    (note,) = rewriter.notes
    assert f"saw no input of {EXPERTS}.0.gate_proj and 5 more: no calibration token came there" in note
    assert f"it leaves {EXPERTS}.0.up_proj and 1 more alone" in note


@pytest.mark.parametrize("name", SPECS)
def test_statistics_go_along_and_all_can_be_undone(name: str, token_batches: list[Tensor]) -> None:
    model = take_apart(build_model("qwen2_moe").double())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    graph, needs = find_graph(model), frozenset({"hessian", "absmax", "mean_abs", "float64"})
    names = [name for name in graph.linears if ".experts." in name]
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, *SPECS[name]))

    def gathered() -> dict[str, InputStatistics]:
        found: dict[str, InputStatistics] = {}
        collect_statistics(model, of_inputs(token_batches), dict.fromkeys(names, needs), found.update)
        return found

    statistics, transform = gathered(), transforms()[name]
    targets = transform.find_targets(graph, rewriter.specs).names
    apply_transform(rewriter, transform, targets, of_inputs(token_batches), Processes())
    after = gathered()
    assert len(names) == 24 and set(names) <= set(rewriter.input_changes)
    for name in names:
        carried = transform_statistics(statistics[name], rewriter.input_changes[name], name)
        for part in carried.sums:
            expected = after[name].sums[part]  # norms and factors are of float32
            assert float((carried.sums[part] - expected).norm()) <= 1e-6 * float(expected.norm())
    rewriter.undo_log.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*SPECS, "turn"])
def test_what_was_prepared_and_transformed_is_put_together_again(
    name: str, family: str, token_batches: list[Tensor]
) -> None:
    model = build_model(family)
    fused, before = model.get_submodule(EXPERTS), model(token_batches[0], use_cache=False).logits
    weight, given = SPECS.get(name, SPECS["awq"])
    points = {"weight": weight} | ({"input": given} if given else {})
    prepared = wrapq.prepare(model, PTQConfig(None, None, {"*_proj": points}))
    stage = {"algorithm": "rotate", "rotations": ["R4"]} if name == "turn" else {"algorithm": name}
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_batches]
    wrapq.calibrate(prepared, batches, {"change": stage, "round": "rtn"}, "parallel")
    restored = wrapq.restore(prepared)
    after = restored(token_batches[0], use_cache=False).logits
    assert 1e-9 < float((after - before).norm() / before.norm()) < 1e-5
    assert (restored.get_submodule(EXPERTS) is fused) == (name != "turn")  # which turns nothing at each forward
