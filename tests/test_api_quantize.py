"""`wrapq.quantize`: every recipe that ships on an encoder and on a convolutional network, done or refused with why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import wrapq
from tests.recipes.test_recipes import NAMES
from wrapq.engine.quantize_module import as_batch, example_of
from wrapq.errors import CalibrationError, LifecycleError, PlanError, RecipeError
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve_module
from wrapq.resolve.rules import Sources
from wrapq.runtime.module import QuantizedModule

CONVOLUTIONS = "rules.linear.match.type=[Linear,Conv2d]"
MLP = "rules.mlp.match: name '*.mlp.*' matches no module"
OUTSIDE = "stack.round: autoround rounds the weights of blocks, and {} lies in none"
NO_EMBEDDING = "rules.embedding.match: type 'Embedding' matches no module"
NO_ATTENTION = "rules.cache.match: type 'Attention' matches no module"
BATCH_NORM = "rules.norm.match: matches only modules that have no wrapper: BatchNorm2d"
GROUPS = [f"group size 128 does not divide the width {width} ({width} left over)" for width in (27, 16, 9, 32)]
GROUPS_OF_32 = [each.replace("128", "32") for each in GROUPS[:-1]]
WIDTHS = "super-blocks of 256 do not divide the width {}; with scale=float16 each group stands by itself"
NO_LOGITS = (
    "stack.round.gradient: tokens count by the gradient of a language model's loss, and {} makes no logits of tokens"
)
ON_AN_ENCODER = {
    "demo": [MLP],
    "gguf_q4_k": [WIDTHS.format(128)] * 2,
    "w2a16_autoround": [OUTSIDE.format("pooler.dense")],
    "w4a16_autoround": [OUTSIDE.format("pooler.dense")],
    "w4a16_gptq_gradient": [NO_LOGITS.format("BertModel")],
}
"""All problems of each recipe that is refused; the others are done."""
ON_A_NETWORK = {
    "demo": [MLP],
    "gguf_q4_0": [NO_EMBEDDING],
    "gguf_q4_k": [NO_EMBEDDING, WIDTHS.format(128)],
    "gguf_q8_0": [NO_EMBEDDING],
    "circle_int16": [NO_EMBEDDING, BATCH_NORM],
    "circle_w4a16": [NO_EMBEDDING, BATCH_NORM],
    "int16_activations": [NO_EMBEDDING, BATCH_NORM],
    "npu_w4a16_spinquant_gptq": [NO_EMBEDDING, BATCH_NORM],
    "w2a16_autoround": [OUTSIDE.format("head")],
    "w4a16_autoround": [OUTSIDE.format("head")],
    "w4a16_gptq_gradient": [NO_LOGITS.format("Network")],
    "w4a16_w8_embedding": [NO_EMBEDDING],
    "w4a8_kv4_rotated": [NO_ATTENTION],
}
ON_CONVOLUTIONS = {
    **dict.fromkeys(NAMES, GROUPS),
    "demo": [MLP],
    "gguf_q4_0": [NO_EMBEDDING, *GROUPS_OF_32],
    "gguf_q4_k": [NO_EMBEDDING, *map(WIDTHS.format, (27, 16, 9, 32, 128))],
    "gguf_q8_0": [NO_EMBEDDING, *GROUPS_OF_32],
    "circle_int16": [NO_EMBEDDING, BATCH_NORM],
    "circle_w4a16": [NO_EMBEDDING, BATCH_NORM],
    "executorch_w4a8": GROUPS_OF_32,
    "int16_activations": [NO_EMBEDDING, BATCH_NORM],
    "npu_w4a16_spinquant_gptq": [NO_EMBEDDING, BATCH_NORM],
    "w2a16_autoround": [each.replace("128", "64") for each in GROUPS],
    "w4a16_gptq_gradient": [NO_LOGITS.format("Network"), *GROUPS],
    "w4a16_w8_embedding": [NO_EMBEDDING, *GROUPS],
    "w4a8_kv4_rotated": [NO_ATTENTION, *GROUPS],
    **{
        name: []
        for name in (
            "executorch_w8a8",
            "onnx_w8a8",
            "openvino_w8a8",
            "torchao_w8a8",
            "w8a8_pt2e_head",
            "w8a8_dynamic",
            "w8a8_smoothquant",
            "w8a8_static",
            "w8a8_static_rotated",
        )
    },
}
RUN = ("int16_activations", "w4a8_kv4_rotated", "w8a16", "w8a8_static_rotated")
"""Run in the plain tests; the others are planned there, and their runs are slow."""
CASES = [
    pytest.param(name, run, id=f"{name}-{'run' if run else 'plan'}", marks=pytest.mark.slow if late else ())
    for name in NAMES
    for run, late in (((True, False),) if name in RUN else ((False, False), (True, True)))
]
LOST = {"w8": 0.01, "w4a4": 0.15, "w4": 0.05, "w3": 0.05, "onnx_w4": 0.05, "executorch_w4": 0.05, "gguf_q4": 0.05}
"""How far the outputs may move, relative to their norm, by the beginning of a recipe's name; 0.02 where none fits."""


class Bottleneck(nn.Module):
    """As in a MobileNet: wider, depthwise, narrow again, added to what came."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.bn0 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn1, self.act = nn.BatchNorm2d(2 * width), nn.ReLU6()
        self.narrow, self.bn2 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.depth(self.act(self.bn0(self.widen(x))))))
        return x + self.bn2(self.narrow(y))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        self.blocks = nn.ModuleList(Bottleneck(16) for _ in range(2))
        self.neck, self.head = nn.Conv2d(16, 128, 1), nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.neck(x).mean((2, 3)))


@cache
def network() -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    model, images = Network(), torch.randn(24, 3, 16, 16)
    with torch.no_grad():
        for _ in range(8):  # the batch norms learn what comes
            model(images)
    return model, images.split(8)


@cache
def encoder() -> tuple[nn.Module, Sequence[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32)
    batches = []
    for length in (12, 16):
        mask = (torch.arange(16)[None] < torch.tensor([length, 9, 16, 5])[:, None]).long()
        batches.append({"input_ids": torch.randint(1, 96, (4, 16)) * mask, "attention_mask": mask})
    return transformers.BertModel(config).eval(), batches


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state if isinstance(batch, dict) else model(batch)


def lost(model: nn.Module, quantized: nn.Module, batch: Any) -> float:
    """How far the outputs moved, relative to their norm."""
    expected = output(model, batch)
    return float((output(quantized, batch) - expected).norm() / expected.norm())


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def refused(model: nn.Module, name: str, batches: Sequence[Any], *overrides: str) -> list[str]:
    """The problems of the plan, and nothing was changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError) as error:
        wrapq.quantize(model, name, batches, overrides)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    return [str(problem) for problem in error.value.problems]


def check(
    name: str, run: bool, model: nn.Module, batches: Sequence[Any], problems: Sequence[str], *overrides: str
) -> None:
    model = copy.deepcopy(model).eval()
    if problems:
        found = refused(model, name, batches, *overrides)
        assert len(found) == len(problems)
        assert all(problem in said for problem, said in zip(problems, found, strict=True)), found
    elif run:
        quantized = wrapq.quantize(copy.deepcopy(model), name, batches, overrides)
        allowed = next((value for start, value in LOST.items() if name.startswith(start)), 0.02)
        assert converted(quantized) and 0 < lost(model, quantized, batches[0]) < allowed
    else:
        composed = compose([f"recipe={name}", *overrides])
        example = example_of(model, as_batch(model, batches[0]))
        assert resolve_module(composed.recipe, model, Sources(composed.sources), example).modules


@pytest.mark.parametrize(("name", "run"), CASES)
def test_every_shipped_recipe_on_an_encoder(name: str, run: bool) -> None:
    check(name, run, *encoder(), ON_AN_ENCODER.get(name, []))


@pytest.mark.parametrize(("name", "run"), CASES)
def test_every_shipped_recipe_on_the_linear_layer_of_a_network(name: str, run: bool) -> None:
    check(name, run, *network(), ON_A_NETWORK.get(name, []))


@pytest.mark.parametrize(("name", "run"), CASES)
def test_every_shipped_recipe_on_convolutions(name: str, run: bool) -> None:
    check(name, run, *network(), ON_CONVOLUTIONS[name], CONVOLUTIONS)


@pytest.mark.parametrize(
    ("name", "overrides", "allowed"),
    [
        ("w8a16", ["rules.linear.weight=int8:channel:sym"], 0.01),
        ("w4a16_gptq", ["rules.linear.weight=int4:channel:sym"], 0.15),
        ("w8a8_dynamic", ["rules.linear.input=int8:tensor:asym:dyn"], 0.01),
        ("w8a8_static_rotated", ["stack.rotate.rotations=[R4]"], 0.01),
        (
            "int16_activations",
            ["~rules.embedding", "~rules.norm", "+algorithm@stack.fold=fold_norms", "calibration.schedule=parallel"],
            0.01,
        ),
    ],
)
def test_overrides_that_fit_a_recipe_to_convolutions(name: str, overrides: list[str], allowed: float) -> None:
    model, images = network()
    quantized = wrapq.quantize(copy.deepcopy(model), name, images, [CONVOLUTIONS, *overrides])
    assert converted(quantized) >= {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert lost(model.eval(), quantized, images[0]) < allowed


def test_what_it_does_is_what_prepare_calibrate_and_convert_do() -> None:
    model, batches = encoder()
    quantized = wrapq.quantize(copy.deepcopy(model), "w4a16_gptq", batches)
    overrides = {"*embeddings": None, "*LayerNorm": None}
    by_hand = wrapq.prepare(copy.deepcopy(model), wrapq.PTQConfig("int4:g128:sym:signed", None, overrides))
    wrapq.calibrate(by_hand, batches, {"round": "gptq"})
    by_hand = wrapq.convert(by_hand)
    assert converted(quantized) == converted(by_hand)
    assert torch.equal(output(quantized, batches[0]), output(by_hand, batches[0]))


def test_padding_enters_no_statistic() -> None:
    model, batches = encoder()
    other = [{**b, "input_ids": b["input_ids"] + 7 * (1 - b["attention_mask"])} for b in batches]
    found = [wrapq.quantize(copy.deepcopy(model), "w8a8_static", given) for given in (batches, other)]
    assert torch.equal(*(output(quantized, batches[0]) for quantized in found))


def test_a_stage_that_rounds_blocks_where_what_lies_outside_is_left_out() -> None:
    model, batches = encoder()
    overrides = ["stack.round.iterations=3", "+rules.outside={match: {name: pooler.dense}, quantize: false}"]
    quantized = wrapq.quantize(copy.deepcopy(model), "w4a16_autoround", batches, overrides)
    assert len(converted(quantized)) == 12 and lost(model, quantized, batches[0]) < 0.05


def test_what_stays_float_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, images = network()
    with caplog.at_level(logging.WARNING, "wrapq"):
        wrapq.quantize(copy.deepcopy(model), "w8a16", images)
    assert [record.getMessage() for record in caplog.records] == [
        "w8a16: Conv2d stem and 7 more with 5,232 parameters stay float: no rule",
        "w8a16: BatchNorm2d bn and 6 more with 352 parameters stay float: no wrapper",
    ]


def test_all_problems_come_together() -> None:
    model, images = network()
    found = refused(copy.deepcopy(model), "w8a8_static_rotated", images, "float_prefix=1", "~stack.ranges")
    assert found[0].startswith("override float_prefix=1: float_prefix: the first tokens of a sequence")
    assert "no stage decides 1 static activations, such as head.input" in found[1] and len(found) == 2
    found = refused(copy.deepcopy(model), "w8a8_static", images, "float_prefix=1", "rules.linear.match.type=Embedding")
    assert len(found) == 2 and "matches no module" in found[1]


def test_batches_are_asked_for_by_what_looks_at_data() -> None:
    model, images = network()
    for name, stage in (("w4a16_gptq", "round: gptq"), ("w8a8_static", "smooth: smoothquant")):
        (problem,) = refused(copy.deepcopy(model), name, [])
        assert f"stack.{stage} looks at data, and there are no batches" in problem
    assert lost(model.eval(), wrapq.quantize(copy.deepcopy(model), "w8a16", ()), images[0]) < 0.01


def test_one_batch_in_place_of_a_list() -> None:
    model, batches = encoder()
    with pytest.raises(CalibrationError, match=r"the text 'input_ids': give a list of batches, such as \[batch\]"):
        wrapq.quantize(copy.deepcopy(model), "w8a8_static", batches[0])


def test_a_recipe_by_its_file_or_composed(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "w8a16.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("name: w8a16", "name: mine"))
    model, images = network()
    composed = compose(["recipe=w8a16"])
    found = [wrapq.quantize(copy.deepcopy(model), each, ()) for each in ("w8a16", tmp_path / "mine.yaml", composed)]
    assert torch.equal(output(found[0], images[0]), output(found[1], images[0]))
    assert torch.equal(output(found[0], images[0]), output(found[2], images[0]))
    with pytest.raises(RecipeError, match="the recipe is composed already"):
        wrapq.quantize(model, composed, (), ["rules.linear.weight=int8:channel"])


def test_one_layer_and_a_module_in_training() -> None:
    layer = nn.Linear(128, 8)
    assert isinstance(wrapq.quantize(layer, "w8a16", ()), QuantizedModule)
    model, images = network()
    model = copy.deepcopy(model).train()
    before = model.bn.running_mean.clone()
    quantized = wrapq.quantize(model, "w8a8_static", images)
    assert not quantized.training and torch.equal(quantized.get_submodule("bn").running_mean, before)


def test_after_data_that_cannot_be_used_the_module_is_float() -> None:
    model, images = network()
    model = copy.deepcopy(model)
    with pytest.raises(CalibrationError, match=r"head\.input"):
        wrapq.quantize(model, "w8a8_static", [images[0], images[1] * torch.nan], ["~stack.smooth"])
    assert type(model.head) is nn.Linear
    quantized = wrapq.quantize(model, "w8a8_static", images)
    with pytest.raises(LifecycleError, match="quantized already"):
        wrapq.quantize(quantized, "w8a16", ())
