"""Cross-layer equalization: both sides of a channel share a range, in chains and convolutions too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.algorithms.transforming import outputs_moved
from tests.conftest import KINDS, build_model
from tests.graph.test_dataflow import Images
from tests.resolve.conftest import make_plan, refusal  # noqa: F401
from wrapq import PTQConfig, calibrate, convert, prepare
from wrapq.algorithms.cle import CLE, absorb
from wrapq.errors import PlanError
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics

W8 = {"weight": QuantSpec.parse("int8:tensor")}


@pytest.mark.parametrize("family", [*KINDS, "gemma3", "mixtral"])
def test_the_function_stays(family: str, token_batches: list[Tensor]) -> None:
    change, found = outputs_moved(build_model(family), [CLE()], token_batches)
    assert found[0].names
    assert 1e-9 < change < 1e-5


def test_one_pair_has_the_ranges_of_the_paper() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    first, second = (model[i].weight.detach().clone() for i in (0, 2))
    graph = find_graph(model, [torch.randn(3, 6, dtype=torch.float64)])
    CLE().apply(GraphRewriter(model, graph, {"0": W8}), "0", {})
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    s = (r1 * r2).sqrt() / r2  # equation 11
    torch.testing.assert_close(model[0].weight.detach(), first / s[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(model[2].weight.detach(), second * s, rtol=1e-6, atol=0)


def test_a_chain_settles_with_equal_ranges_everywhere() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(3, 6)
    graph, before = find_graph(model, [x]), model(x)
    found = CLE().find_targets(graph, {"0": W8, "2": W8, "4": W8})
    assert found.names == ("0",)
    CLE().apply(GraphRewriter(model, graph, {"0": W8, "2": W8}), "0", {})
    torch.testing.assert_close(model(x), before)
    for made, read in ((0, 2), (2, 4)):
        ratio = model[made].weight.abs().amax(1) / model[read].weight.abs().amax(0)
        assert ratio.detach().log().abs().amax() < 0.01


def test_convolutions_with_unequal_channels_quantize_better_after_it() -> None:
    def error(stack: dict[str, str]) -> float:
        torch.manual_seed(0)
        model, x = Images(), torch.randn(4, 3, 8, 8)
        with torch.no_grad():  # the same function with channels of very different ranges
            spread = torch.logspace(-2, 2, 4)
            model.first.weight.mul_(spread[:, None, None, None])
            model.first.bias.mul_(spread)
            model.second.weight.div_(spread[:, None, None])
            expected = model(x)
        model = prepare(model, PTQConfig(weight="int8:tensor:sym", activation=None))
        done = calibrate(model, [x], {**stack, "round": "rtn"})
        assert set(done.transforms) == set(stack) - {"round"}
        with torch.no_grad():
            return float((convert(model)(x) - expected).norm() / expected.norm())

    assert error({"equalize": "cle"}) < 0.2 * error({})


def test_a_model_without_pairs_is_refused() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), PTQConfig(activation=None))
    with pytest.raises(PlanError, match="CLE has nothing to do"):
        calibrate(model, [torch.randn(2, 4)], {"equalize": "cle", "round": "rtn"})


def test_what_smoothquant_scales_is_not_equalized_as_well(refusal: object) -> None:  # noqa: F811
    rules = "l: {match: {type: Linear}, weight: int8:channel, points: {input: int8:token:dyn}}"
    stack = "smooth: {algorithm: smoothquant, feeds: all}\nequal: {algorithm: cle}\nround: {algorithm: rtn}"
    assert "smooth and equal would both scale the input of" in refusal(rules, stack)  # type: ignore[operator]


def test_high_biases_are_absorbed_as_in_the_paper() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double().requires_grad_(False)
    model[0].bias.copy_(torch.tensor([9.0, -9.0, 0.0, 9.0, 9.0]))
    batches = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
    before = [model(x) for x in batches]
    (w1, b1), (w2, b2) = ((model[i].weight.clone(), model[i].bias.clone()) for i in (0, 2))
    least = torch.relu(torch.cat(batches) @ w1.t() + b1).amin(0)
    graph = find_graph(model, [batches[0]])
    statistics = InputStatistics(("least",))
    for x in batches:
        statistics.add(torch.relu(model[0](x)))
    rewriter = GraphRewriter(model, graph, {"0": W8})
    assert absorb(rewriter, graph.by_producer["0"], {"2": statistics}) == 3
    torch.testing.assert_close(model[0].bias, b1 - least, rtol=1e-5, atol=1e-5)  # section 4.1.3, equations 13 to 15
    torch.testing.assert_close(model[2].bias, b2 + w2 @ least, rtol=1e-5, atol=1e-5)
    for x, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_absorb_unless_they_pad_with_zeros(padding: int) -> None:
    torch.manual_seed(0)
    model, x = Images().requires_grad_(False), torch.randn(4, 3, 8, 8)
    model.first.bias.add_(8.0)
    if padding:
        model.second, model.pool = nn.Conv2d(4, 5, 3, padding=padding).requires_grad_(False), nn.MaxPool2d(3)
    expected, bias = model(x), model.first.bias.clone()
    prepared = prepare(model, PTQConfig(weight="int8:tensor:sym", activation=None))
    stack = {"equalize": {"algorithm": "cle", "absorb": True}, "round": "rtn"}
    (figures,) = calibrate(prepared, [x], stack).transforms["equalize"].values()
    assert (figures["absorbed_channels"] >= 4) == (padding == 0)
    assert float((prepared(x) - expected).norm() / expected.norm()) < 0.05
    assert padding or float(model.first.bias.max()) < float(bias.max()) - 1
