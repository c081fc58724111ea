"""Grouped and depthwise convolutions: each group is rounded and corrected by the patches that it meets itself."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import unfold

import wrapq
from tests.algorithms.test_gptq import literal_gptq
from wrapq import PTQConfig
from wrapq.algorithms.base import Rounded
from wrapq.algorithms.gptq import GPTQ
from wrapq.algorithms.low_rank import LowRank
from wrapq.calibration.grouped_conv import correct_by_group, round_by_group, unsupported
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics, UnusableStatisticsError

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EXACT = {"algorithm": "gptq", "precision": "float64"}
OBSERVED = {**EXACT, "ranges": "observer"}
LEARNED = {"algorithm": "adaround", "iterations": 200}


def config(weight: str = "int4:channel:sym", **more: object) -> PTQConfig:
    return PTQConfig(weight=weight, activation=None, **more)


def images(*shape: int, seed: int = 1) -> Tensor:
    """Smooth ones, off zero, of channels of very different sizes: patches whose elements go together."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x + x.roll(1, -1) + x.roll(1, -2) + 0.5
    return x * torch.logspace(-1, 1, shape[1]).view(-1, *[1] * (len(shape) - 2))


def calibrated(net: nn.Module, stack: object, *batches: Tensor, weight: str = "int4:channel:sym", **more: object):
    model = wrapq.prepare(copy.deepcopy(net), config(weight))
    return model, wrapq.calibrate(model, list(batches), stack, **more)


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    stride, dilation, kernel = several(1, 2), several(1, 2), several(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: object = several(0, 2)
    if draw(st.booleans()) and stride == (1,) * dims:
        padding = "same"
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    batch = () if draw(st.booleans()) else (2,)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    seeded(draw(st.integers(0, 99)))
    return KINDS[dims](channels, out, kernel, **options), torch.randn(*batch, channels, *[7, 6, 8][:dims])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(convolutions())
def test_each_groups_patches_times_its_rows_are_the_convolution(made: tuple[nn.Module, Tensor]) -> None:
    conv, x = made
    rows = wrapq.prepare(copy.deepcopy(conv), config()).input_matrix(x)
    rows = rows if conv.groups > 1 else rows[None]
    assert rows.dim() == 3 and len(rows) == conv.groups
    with torch.no_grad():
        got = rows @ conv.weight.flatten(1).unflatten(0, (conv.groups, -1)).mT  # [G, M, N / G]
        got = got.movedim(0, 1).flatten(1) + conv.bias
        expected = conv(x if x.dim() == conv.weight.dim() else x[None]).movedim(1, -1)
    torch.testing.assert_close(got, expected.flatten(0, -2), rtol=1e-4, atol=1e-5)


LAYERS = ("grouped", "depthwise", "multiplied")


def layer(name: str) -> nn.Conv2d:
    """Of eight channels that go in."""
    seeded(5)
    if name == "grouped":
        return nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
    if name == "depthwise":
        return nn.Conv2d(8, 8, 3, dilation=2, groups=8)
    return nn.Conv2d(8, 16, (3, 2), padding=(1, 0), groups=8)


def patches(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Those [M, K] that each group meets, in float64."""
    options = {"dilation": conv.dilation, "padding": conv.padding, "stride": conv.stride}
    return [unfold(part.double(), conv.kernel_size, **options).mT.flatten(0, 1) for part in x.chunk(conv.groups, 1)]


# on these grids no weight starts between two numbers, as the largest of a symmetric integer range does, from where
# float32 and float64 may go on in different ways
@pytest.mark.parametrize("weight", ["uint4:channel:asym", "uint2:g3:asym", "fp4_e2m1:channel", "nf4:g3"])
@pytest.mark.parametrize("name", LAYERS)
def test_gptq_is_the_papers_algorithm_for_each_group_by_itself(name: str, weight: str) -> None:
    conv, x = layer(name), images(6, 8, 12, 11)
    model, done = calibrated(nn.Sequential(conv), {"round": OBSERVED}, x[:2], x[2:], weight=weight)
    quantizer, start, size = model[0].weight_quantizer, 0, conv.out_channels // conv.groups
    for rows in patches(conv, x):
        part = slice(start, start := start + size)
        matrix = conv.weight.detach()[part].flatten(1)
        qparams = observe_tensor(matrix, QuantSpec.parse(weight), "w")
        expected = literal_gptq(matrix, rows.t() @ rows, qparams, 0.01, True)
        assert torch.equal(quantizer.scale[part], qparams.scale)
        # the numbers of a grid lie further apart, so that the integers are the same
        torch.testing.assert_close(model[0].weight[part].flatten(1).double(), expected, rtol=1e-5, atol=1e-7)
        report = done.reports["0.weight"]
        assert report["rows"] == len(rows) and report["damp"] == 0.01 and not report["dead_columns"]


@pytest.mark.parametrize(
    ("algorithm", "weight"),
    [
        *((algorithm, "int4:channel:sym") for algorithm in (EXACT, "seqmse", LEARNED, {**EXACT, "asymmetric": 1.0})),
        *(("seqmse", weight) for weight in ("uint4:g3:asym", "int3:b1x4:sym")),
        (LEARNED, "uint4:g3:asym"),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_groups_are_rounded_as_so_many_convolutions_of_their_own(name: str, algorithm: object, weight: str) -> None:
    """The layer before is rounded to two bits, so that the float model's inputs differ, and makes channels of very
    different sizes."""
    conv, x = layer(name), images(6, 5, 12, 11)
    seeded()
    first = nn.Conv2d(5, 8, 1)
    first.weight.data *= torch.logspace(-2, 1, 8).view(-1, 1, 1, 1)
    stack, specs = {"round": algorithm}, {"first": {"weight": "int2:channel:sym"}}

    class Net(nn.Module):
        def __init__(self, *convolutions: nn.Module) -> None:
            super().__init__()
            self.first, self.convolutions = copy.deepcopy(first), nn.ModuleList(copy.deepcopy(convolutions))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.first(x)
            parts = x.chunk(len(self.convolutions), 1)
            return [conv(part) for conv, part in zip(self.convolutions, parts, strict=True)]

    alone = []
    for index in range(conv.groups):
        part = nn.Conv2d(
            conv.in_channels // conv.groups, conv.out_channels // conv.groups, conv.kernel_size, conv.stride,
            conv.padding, conv.dilation,
        )  # fmt: skip
        part.weight.data, part.bias.data = (t.detach().chunk(conv.groups)[index] for t in (conv.weight, conv.bias))
        alone.append(part)
    made = []
    for net in (Net(conv), Net(*alone)):
        model = wrapq.prepare(net, config(weight, overrides=specs))
        made.append((model, wrapq.calibrate(model, [x[:3], x[3:]], stack)))
    (together, its), (apart, theirs) = made
    quantizers = [module.weight_quantizer for module in apart.convolutions]
    got = together.convolutions[0].weight_quantizer
    # sums of other orders may turn a weight that lies between two numbers of the grid
    same = got.integers == torch.cat([q.integers for q in quantizers])
    assert same.float().mean() > 0.98
    assert (got.scale == torch.cat([q.scale for q in quantizers])).float().mean() > 0.85
    report = its.reports["convolutions.0.weight"]
    others = [theirs.reports[f"convolutions.{i}.weight"] for i in range(conv.groups)]
    for figure, combine in (("damp", max), ("dead_columns", sum), ("rows_to_nearest", sum)):
        if figure in others[0]:
            assert report[figure] == pytest.approx(combine(other[figure] for other in others), abs=1)
    assert not its.fallbacks


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "seqmse", "adaround"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_error_is_that_of_the_convolution(name: str, algorithm: str) -> None:
    conv, x = layer(name), images(6, 8, 12, 11)
    stack = {"round": algorithm, "fix": "bias_correction"} if algorithm == "rtn" else {"round": algorithm}
    model, done = calibrated(nn.Sequential(conv), stack, x)
    report = done.reports["0.weight"]
    with torch.no_grad():
        plain, bare = copy.deepcopy(conv).double(), copy.deepcopy(conv).double()
        bare.weight.copy_(model[0].weight)
        plain.bias.zero_(), bare.bias.zero_()
        lost = (bare(x.double()) - plain(x.double())).square().sum() / plain(x.double()).square().sum()
    if algorithm == "rtn":  # no Hessian was asked for
        assert "output_error" not in report
    else:
        assert report["output_error"] == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("weight", ["int3:channel:sym", "int3:tensor:sym"])
@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_gives_each_channel_its_mean_back(name: str, weight: str) -> None:
    conv, x = layer(name), images(6, 8, 12, 11)
    stack = {"round": "rtn", "fix": "bias_correction"}
    model, done = calibrated(nn.Sequential(conv), stack, x[:2], x[2:], weight=weight)
    with torch.no_grad():
        wanted, got, plain = conv(x), model(x), nn.functional.conv2d(
            x, model[0].weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )  # fmt: skip
    dims = (0, 2, 3)
    torch.testing.assert_close(got.mean(dims), wanted.mean(dims), rtol=1e-4, atol=1e-4)
    shift = wanted.mean(dims) - plain.mean(dims)
    assert float(shift.abs().max()) > 1e-2
    assert done.reports["0.weight"]["bias_shift"] == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-3)


def test_the_empirical_bias_gives_each_channel_the_float_models_mean() -> None:
    seeded()
    net, x = nn.Sequential(nn.Conv2d(5, 8, 1), nn.ReLU(), layer("depthwise")), images(6, 5, 12, 11)
    stack = {"round": "rtn", "fix": {"algorithm": "bias_correction", "empirical": True}}
    model, _ = calibrated(net, stack, x[:3], x[3:], weight="int3:channel:sym")
    with torch.no_grad():
        torch.testing.assert_close(model(x).mean((0, 2, 3)), net(x).mean((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_a_global_scale_is_that_of_all_groups() -> None:
    seeded()
    conv = nn.Conv2d(64, 32, 2, groups=4)
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-1, 1, 32).view(-1, 1, 1, 1))
    x = images(2, 64, 9, 9)
    model, _ = calibrated(nn.Sequential(conv), {"round": "gptq"}, x, weight="nvfp4")
    plain, _ = calibrated(nn.Sequential(conv), {"round": "rtn"}, x, weight="nvfp4")
    assert torch.equal(model[0].weight_quantizer.global_scale, plain[0].weight_quantizer.global_scale)
    with torch.no_grad():
        better, worse = ((m(x) - conv(x)).square().mean() for m in (model, plain))
    assert better < 0.9 * worse
    assert torch.equal(wrapq.convert(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize("weight", ["int4:tensor:sym", "uint4:tensor:asym", "int4:channel@1:sym", "int4:b2x9:sym"])
@pytest.mark.parametrize("algorithm", ["gptq", "seqmse", "adaround"])
def test_groups_may_share_scales(weight: str, algorithm: str) -> None:
    seeded()
    net, x = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4)), images(6, 8, 12, 11)  # three rows a group
    lost = {}
    for name in ("rtn", algorithm):
        model, done = calibrated(net, {"round": name}, x[:3], x[3:], weight=weight)
        shape = observe_tensor(net[0].weight.detach().flatten(1), QuantSpec.parse(weight), "w").scale.shape
        assert model[0].weight_quantizer.scale.shape == shape and not done.fallbacks
        with torch.no_grad():
            lost[name] = float((model(x) - net(x)).square().mean())
            assert torch.equal(wrapq.convert(copy.deepcopy(model))(x), model(x))
    assert lost[algorithm] < {"gptq": 0.9}.get(algorithm, 0.99) * lost["rtn"]


@pytest.mark.parametrize("weight", ["uint4:tensor:asym", "nf4:channel@1"])
def test_gptq_in_scales_that_groups_share_is_the_papers_algorithm(weight: str) -> None:
    conv, x, spec = layer("grouped"), images(6, 8, 12, 11), QuantSpec.parse(weight)
    model, _ = calibrated(nn.Sequential(conv), {"round": OBSERVED}, x[:2], x[2:], weight=weight)
    qparams = observe_tensor(conv.weight.detach().flatten(1), spec, "w")
    size = conv.out_channels // conv.groups
    for index, rows in enumerate(patches(conv, x)):
        part = slice(index * size, (index + 1) * size)
        expected = literal_gptq(conv.weight.detach()[part].flatten(1), rows.t() @ rows, qparams, 0.01, True)
        torch.testing.assert_close(model[0].weight[part].flatten(1).double(), expected, rtol=1e-5, atol=1e-7)


def test_a_rounder_that_takes_each_group_by_itself_cannot_share_scales() -> None:
    for text in ("int8:tensor:sym", "int8:channel@1:sym", "int4:b2x9:sym"):  # three rows a group
        spec = QuantSpec.parse(text)
        assert "cannot share scales" in unsupported(Partly(), spec, rows=12, groups=4)
        assert unsupported(Partly(), spec, rows=12, groups=1) is None
    for text in ("int8:channel:sym", "int4:g3:sym", "int4:b3x9:sym"):
        assert unsupported(Partly(), QuantSpec.parse(text), rows=12, groups=4) is None


def test_autoround_learns_them() -> None:
    conv, x = layer("depthwise"), images(6, 8, 12, 11)
    lost = {}
    for name, stack in {"nearest": "rtn", "learned": {"algorithm": "autoround", "iterations": 60}}.items():
        model, done = calibrated(nn.Sequential(conv), {"round": stack}, x[:3], x[3:], weight="int3:channel:sym")
        with torch.no_grad():
            lost[name] = float((model(x) - conv(x)).square().mean())
    assert lost["learned"] < 0.99 * lost["nearest"] and not done.fallbacks


def test_channels_that_no_data_reached_are_dead_columns_of_their_group() -> None:
    conv, x = nn.Conv2d(4, 4, 3, groups=4), images(3, 4, 9, 9)
    x[:, 2] = 0
    model, done = calibrated(nn.Sequential(conv), {"round": OBSERVED}, x)
    assert done.reports["0.weight"]["dead_columns"] == 9 and not done.fallbacks
    nearest = observe_tensor(conv.weight.detach().flatten(1), QuantSpec.parse("int4:channel:sym"), "w")
    assert torch.equal(model[0].weight_quantizer.integers[2], nearest.quantize(conv.weight.detach().flatten(1))[2])


class Partly(GPTQ):
    """GPTQ of each group by itself that cannot use the statistics of weights below zero in the mean."""

    groups_at_once = False

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        if weight.mean() < 0:
            raise UnusableStatisticsError(f"{where}: its Hessian is not positive definite whatever the damping")
        return super().round(weight, spec, where, statistics)


def test_groups_whose_statistics_cannot_be_used_are_rounded_to_nearest_and_counted() -> None:
    weight, spec = torch.randn(6, 9).abs(), QuantSpec.parse("int4:channel:sym")
    weight[2:4], weight[4:] = -weight[2:4], -weight[4:]
    statistics, said = InputStatistics(), []
    statistics.add(torch.randn(3, 50, 9))
    rounded = round_by_group(Partly(), weight, spec, "conv.weight", statistics, said)
    nearest, best = (observe_tensor(weight, spec, "w"), GPTQ().round(weight[:2], spec, "w", statistics.group(0)))
    assert torch.equal(rounded.integers, torch.cat([best.integers, nearest.quantize(weight)[2:]]))
    assert torch.equal(rounded.qparams.scale, torch.cat([best.qparams.scale, nearest.scale[2:]]))
    assert rounded.report["fallback"] == 2
    reason = "conv.weight: its Hessian is not positive definite whatever the damping"
    assert said == [f"{reason}; 2 of its 3 groups are rounded to nearest"]
    rounded = round_by_group(Partly(), -weight.abs(), spec, "conv.weight", statistics, said)
    assert torch.equal(rounded.integers, observe_tensor(-weight.abs(), spec, "w").quantize(-weight.abs()))
    assert rounded.report == {"fallback": 1} and said[1:] == [f"{reason}; it is rounded to nearest"]


@pytest.mark.parametrize("algorithm", ["gptq", "seqmse", "adaround"])
def test_a_convolution_that_no_data_reached_is_one_fallback(algorithm: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.met, self.left = nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 8, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.met(x) if x.shape[-1] < 99 else self.left(x)

    model, done = calibrated(Net(), {"round": algorithm}, torch.randn(2, 4, 16))
    assert done.fallbacks == ["left.weight: no calibration token reached this weight; it is rounded to nearest"]
    assert "rows" in done.reports["met.weight"] and model.left.weight_quantizer.integers.shape == (8, 6)


class Separable(nn.Module):
    """Depthwise separable layers over signals and a head."""

    def __init__(self) -> None:
        super().__init__()
        seeded(3)
        self.stem, self.act = nn.Conv1d(3, 16, 5, stride=2, padding=2), nn.SiLU()
        self.depthwise = nn.ModuleList(nn.Conv1d(16, 16, 7, padding=3, groups=16) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv1d(16, 16, 1, groups=groups) for groups in (1, 4))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = x + self.act(pointwise(depthwise(x)))
        return self.head(x.mean(-1))


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_separable_net_loses_less_by_gptq_than_to_nearest(schedule: str) -> None:
    net, x = Separable(), images(16, 3, 64)
    lost = {}
    for name, stack in {"rtn": "rtn", "gptq": "gptq", "asymmetric": {"algorithm": "gptq", "asymmetric": 1}}.items():
        if name == "asymmetric" and schedule == "parallel":
            continue
        model, done = calibrated(net, {"round": stack}, *x.split(4), weight="int3:channel:sym", schedule=schedule)
        with torch.no_grad():
            lost[name] = float((model(x) - net(x)).square().mean())
            assert torch.equal(wrapq.convert(copy.deepcopy(model))(x), model(x))
        assert not done.fallbacks
    assert lost["gptq"] < 0.7 * lost["rtn"]
    assert lost.get("asymmetric", 0) < 0.9 * lost["gptq"]


def test_what_cannot_correct_groups_says_so() -> None:
    """A corrector of another package that takes convolutions, and would lose all but the first group's matrices."""
    weight, statistics = torch.randn(4, 9), InputStatistics()
    statistics.add(torch.randn(4, 50, 9))
    with pytest.raises(UnusableStatisticsError, match="its groups have inputs of their own, so only a bias"):
        correct_by_group(LowRank(), weight, torch.zeros_like(weight), "conv.weight", statistics)
