"""A part of a model by PT2E and the rest by wrapq, and wrapq around what PT2E converted."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wrapq
from wrapq.errors import ModelError, PlanError, RecipeError
from wrapq.export.lowering import lower
from wrapq.pt2e.base import GRAPH_QUANTIZERS
from wrapq.runtime.graph_program import GraphProgram

pytest.importorskip("torchao")

BY_PT2E = "+rules.part={match: {name: NAME}, by: pt2e, quantizer: QUANTIZER}"

WHOLE = "+rules.part={match: {type: CLASS}, by: pt2e, quantizer: xnnpack}"


class Two(nn.Module):
    """A part of each."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.back = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.front(x))


class Back(nn.Module):
    """The second part under its name, by which quantizers are told of it, and which decides what they fuse."""

    def __init__(self, back: nn.Module) -> None:
        super().__init__()
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(x)


def model_and_batches() -> tuple[Two, list[Tensor]]:
    torch.manual_seed(0)
    return Two().eval(), [torch.randn(rows, 16) for rows in (5, 3)]


def by_rule(name: str, quantizer: str = "xnnpack") -> str:
    return BY_PT2E.replace("NAME", name).replace("QUANTIZER", quantizer)


@pytest.fixture
def only(tmp_path: Path) -> str:
    """A recipe that leaves everything float but what rules of a test add."""
    path = tmp_path / "only.yaml"
    path.write_text("# @package _global_\nname: only\n")
    return str(path)


def quantized(model: nn.Module, batches: list[Tensor], *overrides: str) -> nn.Module:
    return wrapq.quantize(model, "w8a8_static", batches, ["~stack.smooth", *overrides])


def by_hand(part: nn.Module, inputs: list[Tensor], quantizer: Any = None) -> Any:
    """As torchao's own pages say."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(part, (inputs[0],), dynamic_shapes=({0: rows},))
    prepared = prepare_pt2e(program.module(), quantizer or GRAPH_QUANTIZERS.get("xnnpack")().make())
    for x in inputs:
        prepared(x)
    return convert_pt2e(prepared)


@torch.no_grad()
def test_a_part_is_what_pt2e_makes_of_it_by_hand_on_what_the_quantized_rest_brings() -> None:
    model, batches = model_and_batches()
    mixed = quantized(copy.deepcopy(model), batches, by_rule("back"))
    alone = quantized(copy.deepcopy(model), batches, "rules.linear.match={name: 'front.*', type: Linear}")
    back = by_hand(model.back, [alone.front(x) for x in batches])
    for x in (*batches, torch.randn(7, 16)):
        assert torch.equal(mixed.front(x), alone.front(x))
        assert torch.equal(mixed(x), back(alone.front(x)))
    assert isinstance(mixed.back, GraphProgram)
    weights = [t for t in mixed.back.state_dict().values() if t.dim() == 2]
    assert [t.dtype for t in weights] == [torch.int8] * 2, "float weights are left"
    other = by_hand(model.back, [model.front(x) for x in batches])
    assert not torch.equal(mixed(batches[0]), other(alone.front(batches[0]))), "both are calibrated on the same"


@torch.no_grad()
@pytest.mark.parametrize("options", ["", ", options: {dynamic: true}", ", options: {per_channel: false}"])
def test_options_reach_the_quantizer(options: str) -> None:
    model, batches = model_and_batches()
    mixed = quantized(copy.deepcopy(model), batches, by_rule("back", f"xnnpack{options}"))
    operators = {node[2] for node in mixed.back.description["nodes"]}
    assert ("quantized_decomposed.choose_qparams.tensor" in operators) == ("dynamic" in options)
    by_channel = "quantized_decomposed.dequantize_per_channel.default" in operators
    assert by_channel == ("per_channel" not in options)
    x = batches[0]
    assert (mixed(x) - model(x)).norm() < 0.05 * model(x).norm()


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["x86_inductor", "arm_inductor"])
def test_the_other_quantizers_of_torchao(quantizer: str) -> None:
    model, batches = model_and_batches()
    mixed, x = quantized(copy.deepcopy(model), batches, by_rule("back", quantizer)), batches[0]
    assert 0 < (mixed(x) - model(x)).norm() < 0.05 * model(x).norm()


@torch.no_grad()
def test_a_table_of_embeddings_and_a_model_that_is_a_part_as_a_whole(only: str) -> None:
    torch.manual_seed(0)
    table, ids = nn.Sequential(nn.Embedding(32, 8)), torch.arange(12).view(3, 4)
    mixed = wrapq.quantize(copy.deepcopy(table), only, [ids], [by_rule("'0'", "embedding")])
    assert 0 < (mixed(ids) - table(ids)).norm() < 0.01 * table(ids).norm()
    assert {t.dtype for t in mixed.state_dict().values()} == {torch.uint8, torch.float32}
    model, batches = model_and_batches()
    whole = wrapq.quantize(copy.deepcopy(model), only, batches, [WHOLE.replace("CLASS", "Two")])
    assert isinstance(whole, GraphProgram)
    assert torch.equal(whole(batches[0]), by_hand(model, batches)(batches[0]))


@torch.no_grad()
def test_a_part_is_data_and_is_copied_pickled_and_exported() -> None:
    model, batches = model_and_batches()
    mixed, x = quantized(model, batches, by_rule("back")), batches[0]
    expected = mixed(x)
    described = json.loads(json.dumps(mixed.back.description))
    program = GraphProgram(described, dict(mixed.back.graph.named_buffers()))
    assert torch.equal(program(mixed.front(x)), expected)
    for other in (copy.deepcopy(mixed), pickle.loads(pickle.dumps(mixed))):
        assert torch.equal(other(x), expected)
    exported = torch.export.export(lower(mixed), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(exported(x), expected)
    assert torch.equal(exported(batches[1]), mixed(batches[1]))
    assert {t.dtype for t in GraphProgram(described).half().buffers()} == {t.dtype for t in program.buffers()}
    with pytest.raises(ModelError, match=r"\(5, 15\), and was traced as \[None, 16\]"):
        mixed.back(torch.randn(5, 15))
    described["nodes"][-2][2] = "os.system"
    with pytest.raises(ModelError, match="no operator that a saved graph may call"):
        GraphProgram(described)


@torch.no_grad()
def test_wrapq_around_what_pt2e_converted() -> None:
    model, batches = model_and_batches()
    front, x = by_hand(model.front, batches), batches[0]
    around = copy.deepcopy(model)
    around.front = front
    around = quantized(around, batches)
    back = quantized(copy.deepcopy(model.back), [front(x) for x in batches])
    assert around.front is front
    assert torch.equal(around(x), back(front(x)))
    exported = torch.export.export(lower(around), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(exported(batches[1]), around(batches[1]))


@torch.no_grad()
def test_pt2e_around_what_wrapq_converted() -> None:
    """Told its part by name, torchao leaves the lowered one as it is; told nothing, it rounds that a second time."""
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    model, batches = model_and_batches()
    alone = quantized(copy.deepcopy(model), batches, "rules.linear.match={name: 'front.*', type: Linear}")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    mixed = by_hand(lower(alone), batches, xnnpack.XNNPACKQuantizer().set_module_name("back", config))
    named = xnnpack.XNNPACKQuantizer().set_module_name("back", config)
    back = by_hand(Back(model.back), [alone.front(x) for x in batches], named)
    assert all(torch.equal(mixed(x), back(alone.front(x))) for x in batches)
    twice = by_hand(lower(alone), batches, xnnpack.XNNPACKQuantizer().set_global(config))
    assert not torch.equal(mixed(batches[0]), twice(batches[0]))


def test_after_what_cannot_be_used_the_module_is_float() -> None:
    model, batches = model_and_batches()
    before = copy.deepcopy(model)
    with pytest.raises(Exception, match="15"):
        quantized(model, [batches[0], torch.randn(4, 15)], by_rule("back"))
    assert torch.equal(model(batches[0]), before(batches[0]))
    assert type(model.back) is nn.Sequential


class Gated(nn.Module):
    """Called with what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaled, self.act, self.halves = nn.Linear(16, 16), Scaled(), nn.ReLU(), Halves()

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.halves(self.act(self.linear(x)))
        return self.scaled(torch.cat([one, other], -1), 2.0)


class Halves(nn.Linear):
    """A linear layer that gives two tensors."""

    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).chunk(2, -1)


class Scaled(nn.Linear):
    """A linear layer with a number beside its input."""

    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([by_rule("linear", "xnpack")], "rules.part.quantizer: unknown quantizer of PT2E 'xnpack'"),
        ([by_rule("linear", "xnnpack, options: {dinamic: true}")], "rules.part.options.dinamic: xnnpack has no option"),
        ([by_rule("liner")], "name 'liner' matches no module"),
        ([by_rule("linear", "xnnpack, weight: int8")], "leave out weight"),
        ([by_rule("linear", "xnnpack, quantize: false")], "set quantize: true"),
        (["+rules.part={match: {name: linear}, by: pt2e}"], "needs a quantizer"),
        (["+rules.part={match: {name: linear}, quantizer: xnnpack}"], "by: pt2e"),
        ([by_rule("scaled")], "it is called with scale, which is no tensor"),
        ([by_rule("halves")], "halves: it gives more than one tensor"),
        ([by_rule("act", "embedding")], "EmbeddingTable finds nothing in it that it quantizes"),
        (
            [WHOLE.replace("CLASS", "[Gated, Linear]")],
            "linear lies in the model, which rule part hands to PT2E already",
        ),
        (
            [
                by_rule("'*'"),
                "rules.part.match={type: Gated}",
                "+rules.late={match: {name: linear}, weight: int8:channel}",
            ],
            "linear lies in the model, which rule part hands to PT2E as a whole",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(overrides: list[str], told: str, only: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((PlanError, RecipeError)) as error:
        wrapq.quantize(Gated(), only, [torch.randn(4, 16)], overrides)
    assert told in str(error.value)


def test_a_later_rule_takes_a_part_back() -> None:
    model, batches = model_and_batches()
    late = "+rules.late={match: {name: back.0}, weight: int8:channel}"
    mixed = quantized(model, batches, by_rule("back.0"), late)
    assert str(mixed.back[0].specs["weight"]) == "int8:channel:sym"


def test_without_data(only: str) -> None:
    with pytest.raises(PlanError, match="PT2E looks at data, and there are no batches"):
        wrapq.quantize(model_and_batches()[0], only, [], [by_rule("back")])
