"""Nets like MobileNet: batch norms become a part of what is before them, and ranges are evened through depthwise
convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wrapq import PTQConfig, calibrate, convert, prepare
from wrapq.algorithms.cle import CLE
from wrapq.algorithms.fold_norms import FoldNorms
from wrapq.errors import ModelError
from wrapq.graph.batch_norm import is_identity
from wrapq.graph.dataflow import Graph, find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec

SPEC = QuantSpec.parse("int8:tensor:sym")
CONFIG = PTQConfig(weight="int8:tensor:sym", activation=None)


def layer(
    channels: int, out: int, kernel: int = 1, groups: int = 1, stride: int = 1, act: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), act())


class Mobile(nn.Module):
    """A convolution, two depthwise separable ones, one in groups, and a head; channels of very different sizes."""

    def __init__(self, last: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = layer(3, 16, 3, stride=2)
        self.depthwise, self.pointwise = layer(16, 16, 3, 16), layer(16, 24)
        self.strided, self.widen = layer(24, 24, 3, 24, stride=2), layer(24, 32)
        self.grouped = layer(32, 32, 3, 4, act=last)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)
        generator = torch.Generator().manual_seed(11)
        for norm in (module for module in self.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.data.copy_((torch.randn(norm.num_features, generator=generator) * 1.5).exp())
            norm.bias.data.normal_(generator=generator)
            norm.running_mean.normal_(generator=generator)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.1)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.stem(x)))
        x = self.grouped(self.widen(self.strided(x)))
        return self.head(self.pool(x).flatten(1))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def channel_error(model: nn.Module) -> float:
    """The relative error of an output channel's weights rounded with one scale for all, in the mean over all layers."""
    errors = []
    for weight in (module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)):
        lost = observe_tensor(weight, SPEC, "weight").fake_quantize(weight) - weight
        errors.append(lost.flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1))
    return float(torch.cat(errors).mean())


def specs(graph: Graph) -> dict[str, dict[str, QuantSpec]]:
    return {name: {"weight": SPEC} for edge in graph.edges for name in (edge.producer, edge.consumers[0].module)}


def test_every_batch_norm_becomes_part_of_its_convolution_and_back() -> None:
    model, x = Mobile(), images()
    before, expected, graph = {k: v.clone() for k, v in model.state_dict().items()}, model(x), find_graph(model, [x])
    found, rewriter = FoldNorms().find_targets(graph, {}), GraphRewriter(model, graph)
    assert len(found.names) == 6 and not found.skipped
    for target in found.names:
        FoldNorms().apply(rewriter, target, {})
        assert is_identity(model.get_submodule(target))
    inputs = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(model.stem[1](inputs), inputs, rtol=1e-6, atol=0)
    assert relative(model(x), expected) < 1e-5
    rewriter.undo_log.restore()
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_depthwise_and_grouped_convolutions_are_followed_without_weights() -> None:
    edges = find_graph(Mobile().to("meta"), [images().to("meta")]).by_producer
    for made, norm, read in (("stem", "stem.1", "depthwise"), ("depthwise", "depthwise.1", "pointwise")):
        edge = edges[f"{made}.0"]
        assert (edge.norm, edge.ops_between, edge.fully_owned) == (norm, {"positive"}, True)
        assert [consumer.module for consumer in edge.consumers] == [f"{read}.0"]
    assert edges["widen.0"].consumers[0].columns.tolist() == list(range(32))


def test_equalizing_evens_the_ranges_and_keeps_the_function() -> None:
    model, x = Mobile(), images()
    before, expected, graph = {k: v.clone() for k, v in model.state_dict().items()}, model(x), find_graph(model, [x])
    folded, rewriter = copy.deepcopy(model), GraphRewriter(model, graph, specs(graph))
    for target in FoldNorms().find_targets(graph, {}).names:
        FoldNorms().apply(GraphRewriter(folded, graph), target, {})
    assert CLE().find_targets(graph, rewriter.specs).names == ("stem.0",)
    CLE().apply(rewriter, "stem.0", {})
    assert relative(model(x), expected) < 1e-5
    for first, second in (("stem", "depthwise"), ("depthwise", "pointwise"), ("strided", "widen")):
        made, read = (model.get_submodule(f"{name}.0").weight.abs() for name in (first, second))
        of_reader = read.amax((1, 2, 3)) if second == "depthwise" else read.amax((0, 2, 3))
        assert (made.amax((1, 2, 3)) / of_reader).log().abs().amax() < 0.05
    assert channel_error(model) < 0.3 * channel_error(folded)
    rewriter.undo_log.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_from_python_loses_far_less_after_it_and_absorbs_high_biases() -> None:
    def error(stack: dict[str, object]) -> float:
        model, x = Mobile(), images()
        for norm in (model.depthwise[1], model.strided[1]):  # so that pointwise ones, which do not pad, absorb
            norm.bias.add_(norm.weight * 6)
        expected = model(x)
        done = calibrate(model := prepare(model, CONFIG), [x], {**stack, "round": "rtn"})
        figures.update(done.transforms.get("equalize", {}).get("stem.0", {}))
        return relative(convert(model)(x), expected)

    figures: dict[str, float] = {}
    folded = error({"fold": "fold_norms"})
    assert error({"equalize": {"algorithm": "cle", "absorb": True}}) < 0.3 * folded
    assert figures["absorbed_channels"] > 10


def test_what_a_relu6_clips_is_left_with_the_reason() -> None:
    model, x = Mobile(nn.ReLU6), images()
    graph = find_graph(model, [x])
    why = CLE().find_targets(graph, specs(graph)).skipped["grouped.0"]
    assert why == "its output is also seen by a function that clips at a constant, as ReLU6 does"
    assert "grouped.1" in FoldNorms().find_targets(graph, {}).names


class Branching(nn.Module):
    """Batch norms that cannot be folded: behind a ReLU, beside another consumer, before anything; and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.entry = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)
        self.late, self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.second, self.third = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.good, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.late(torch.relu(self.first(self.entry(x)))))
        return self.head(self.good(self.third(torch.relu(self.one(x) + self.two(x)))))


def test_batch_norms_that_others_compete_with_are_left() -> None:
    model, x = Branching(), torch.randn(2, 3, 4, 4)
    graph = find_graph(model, [x])
    assert graph.batch_norms == {"entry": None, "late": None, "one": None, "two": None, "good": "third"}
    found = FoldNorms().find_targets(graph, {})
    assert found.names == ("good",) and "alone reads" in found.skipped["late"]
    with pytest.raises(ModelError, match="late follows no linear or convolution that it alone reads"):
        GraphRewriter(model, graph).fold_batch_norm("late")
    assert find_graph(model.train(), [x]).batch_norms == {}


@pytest.mark.parametrize("kind", [Mobile, Branching])
def test_scaling_every_feed_keeps_the_function(kind: type[nn.Module]) -> None:
    model, x = kind().requires_grad_(False), torch.randn(2, 3, 24, 24)
    expected, graph = model(x), find_graph(model, [x])
    rewriter, scaled = GraphRewriter(model, graph), []
    for edge in (edge for edge in graph.edges if not edge.unowned):
        rewriter.scale(edge, torch.where(edge.owned, torch.rand(edge.width) + 0.5, 1.0))
        scaled.append(edge.producer)
    assert len(scaled) == 6 if kind is Mobile else scaled == ["entry", "late", "third"]
    assert relative(model(x), expected) < 1e-5


def test_a_batch_norm_behind_a_linear_and_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)
    model[1].running_var.uniform_(0.2, 3)
    model[1].running_mean.normal_()
    model, x = model.to(torch.bfloat16), torch.randn(7, 6).to(torch.bfloat16)
    expected, graph = model(x).float(), find_graph(model, [x])
    rewriter = GraphRewriter(model, graph)
    rewriter.fold_batch_norm("1")
    assert is_identity(model[1]) and relative(model(x).float(), expected) < 2e-2
    kept = model[0].weight.clone()
    rewriter.fold_batch_norm("1")  # nothing is left to fold
    assert torch.equal(model[0].weight, kept)


class Grouped(nn.Module):
    """A layer norm whose channels a convolution in groups reads."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 12, 3, padding=padding, groups=4, bias=False)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).transpose(1, 2))


def test_a_weight_that_is_computed_from_others_is_nobodys_to_scale() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=8))
    model = nn.Sequential(nn.Conv1d(4, 8, 1), conv, nn.Conv1d(8, 2, 1))
    assert find_graph(model, [torch.randn(2, 4, 6)]).edges == ()


def test_a_bias_goes_through_groups_but_not_past_padding() -> None:
    model, x = Grouped(0), torch.randn(2, 5, 8)
    expected, graph = model(x), find_graph(model, [x])
    FoldNorms().apply(GraphRewriter(model, graph), "norm", {})
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert bool((model.norm.weight == 1).all()) and not model.norm.bias.any()
    found = FoldNorms().find_targets(find_graph(Grouped(1), [x]), {})
    assert found.skipped == {"norm": "conv pads with zeros, which its bias would have to be added to as well"}
