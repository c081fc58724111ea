"""Experts that share a tensor are taken apart: the same function, every expert a module, and all of it undone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import wrapq
from tests.conftest import build_model
from tests.exports import export_of
from tests.models import DEMO
from wrapq import PTQConfig
from wrapq.errors import PlanError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runtime.module import QuantizedWeight
from wrapq.wrappers.experts import Experts, apart, can_be_taken_apart
from wrapq.wrappers.model import iter_quantizers

PLAIN = ("mixtral", "qwen2_moe", "llama4", "longcat_flash")
FUSED = (*PLAIN, "gpt_oss", "nemotron_h")
LINEARS = {family: {"gate_proj", "up_proj", "down_proj"} for family in PLAIN}
LINEARS |= {"gpt_oss": {"gate_up_proj", "down_proj"}, "nemotron_h": {"up_proj", "down_proj"}}
LAYER = "model.layers.0"
EVALUATION = ("evaluation.tokens=128", "evaluation.seq_len=64", "runtime.kernels=reference")
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
WEIGHTS = PTQConfig("int4:g16:sym", None, {"*norm": None, "lm_head": None, "*embed*": None})


def fused_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if can_be_taken_apart(module)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with the tokenizer of the model that ships."""
    path = tmp_path_factory.mktemp("moe")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vocabulary = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2MoeConfig(vocab_size=vocabulary, shared_expert_intermediate_size=64, **sizes)
    Qwen2MoeForCausalLM(config).save_pretrained(path)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize("family", FUSED)
def test_the_function_stays_and_the_modules_come_back(family: str) -> None:
    model = build_model(family)
    before, expected = fused_of(model), model(IDS, use_cache=False).logits
    assert before
    with apart(model):
        assert not fused_of(model)
        found = model(IDS, use_cache=False).logits
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        assert len(experts) == len(before) and all(len(module) == 4 for module in experts)
        names = {name for name, part in experts[0][2].named_modules() if isinstance(part, nn.Linear)}
        assert names == LINEARS[family]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert fused_of(model) == before and torch.equal(model(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FUSED)
def test_prepared_calibrated_and_converted(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before, expected = fused_of(model), model(IDS, use_cache=False).logits
    prepared = wrapq.prepare(model, WEIGHTS)
    torch.testing.assert_close(prepared(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert fused_of(wrapq.restore(prepared)) == before

    prepared = wrapq.prepare(model, WEIGHTS)
    wrapq.calibrate(prepared, [{"input_ids": ids, "use_cache": False} for ids in token_batches], {"round": "gptq"})
    converted = wrapq.convert(prepared)
    quantized = [name for name, m in converted.named_modules() if isinstance(m, QuantizedWeight)]
    assert sum(".experts." in name for name in quantized) == len(before) * 4 * len(LINEARS[family])
    assert not [m for m in converted.modules() if isinstance(m, Experts) and "fused" in m.__dict__]
    change = (converted(IDS, use_cache=False).logits - expected).norm() / expected.norm()
    assert 0 < change < 0.5


def test_padding_reaches_experts_and_counts_nowhere() -> None:
    config = PTQConfig(None, None, {"*experts.*_proj": {"input": "int8:tensor"}})
    padded = torch.cat([torch.full((1, 5), 50), IDS[:1]], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 12)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ranges = []
    for inputs in ({"input_ids": IDS[:1]}, {"input_ids": padded, "attention_mask": mask, "position_ids": positions}):
        model = wrapq.prepare(build_model("qwen2_moe"), config)
        with wrapq.padding(inputs.get("attention_mask", torch.ones(1, 12))):
            model(**inputs, use_cache=False)
        quantizers = [q for q in iter_quantizers(model) if not q.observer.empty]
        ranges.append({q.where: float(q.observer.range()[1]) for q in quantizers})
    assert ranges[0].keys() == ranges[1].keys() and ranges[0]
    for where, high in ranges[0].items():
        assert ranges[1][where] == pytest.approx(high, rel=1e-4), where


@pytest.mark.parametrize("stack", [{"round": "gptq"}, {"scale": "awq", "round": "gptq"}])
def test_an_expert_without_tokens_is_named(stack: dict[str, str]) -> None:
    model = build_model("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.mlp.gate.weight[0] = layer.mlp.gate.weight[1:].mean(0)  # the mean of others is never the largest
    prepared = wrapq.prepare(model, WEIGHTS)
    found = wrapq.calibrate(prepared, [{"input_ids": IDS, "use_cache": False}], stack)
    assert [text for text in found.fallbacks if "layers.0.mlp.experts.0.gate_proj" in text]
    assert len(found.notes) == ("scale" in stack)
    assert all("AWQ saw no input of model.layers.0.mlp.experts.0.gate_proj" in text for text in found.notes)
    wrapq.convert(prepared)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("w8a8_static", "no token came to it; it has the range of"),
        ("w4a16_gptq", "no calibration token reached this weight; it is rounded to nearest"),
    ],
)
def test_experts_without_tokens_are_named_also_where_statistics_come_from_the_store(
    recipe: str, said: str, folder: Path, tmp_path: Path
) -> None:
    small = [f"model.path={folder}", *EVALUATION, "calibration.samples=1", "calibration.seq_len=4"]
    small += ["tracking=none", f"paths.outputs={tmp_path}"]
    small += ["rules.linear.weight=int4:g32:sym"] if recipe == "w4a16_gptq" else []
    cold, warm = (wrapq.run(recipe, small) for _ in range(2))
    missed = [note for note in cold.notes if said in note]
    assert missed and missed == [note for note in warm.notes if said in note]
    assert any("statistics of" in note for note in warm.notes)
    assert warm.digests["qparams"] == cold.digests["qparams"]


def test_transforms_change_each_expert(token_batches: list[Tensor]) -> None:
    model = build_model("mixtral")
    expected = model(IDS, use_cache=False).logits
    prepared = wrapq.prepare(model, PTQConfig("int8:channel", None, {"*norm": None, "lm_head": None, "*embed*": None}))
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_batches]
    stack = {"fold": {"algorithm": "fold_norms", "untie": True}, "turn": "rotate", "round": "rtn"}
    turned = wrapq.calibrate(prepared, batches, stack).transforms["turn"]["model.embed_tokens"]
    assert turned["writers"] == 1 + 2 * (1 + 4)  # the embedding, and of two layers attention and four experts
    found = wrapq.convert(prepared)(IDS, use_cache=False).logits
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_run_whole_and_streamed_and_its_export(folder: Path, tmp_path: Path) -> None:
    small = [f"model.path={folder}", *EVALUATION, "calibration.samples=4", "calibration.seq_len=64", "tracking=none"]
    small += ["rules.linear.weight=int4:g32:sym", f"paths.outputs={tmp_path}"]
    export = ["export=compressed_tensors", "export.compressed_tensors={reader: transformers, beside_float: false}"]
    whole = wrapq.run("w4a16_gptq", [*small, *export])
    assert export_of(whole).error < 1e-6
    streamed = wrapq.run("w4a16_gptq", [*small, "runtime.load=streaming"])
    assert streamed.digests["qparams"] == whole.digests["qparams"]
    loaded = [wrapq.load(run.folder) for run in (whole, streamed)]
    names = [name for name, m in loaded[0].named_modules() if isinstance(m, QuantizedWeight) and ".experts." in name]
    assert len(names) == 2 * 4 * 3
    assert torch.equal(*(model(IDS).logits for model in loaded))


@pytest.mark.parametrize("recipe", ["w4a16_awq", "w8a8_smoothquant"])
def test_runs_that_scale_experts_have_the_same_bits_also_where_few_tokens_reach_them(
    recipe: str, folder: Path, tmp_path: Path
) -> None:
    small = [f"model.path={folder}", *EVALUATION, "calibration.samples=1", "calibration.seq_len=4"]
    small += ["tracking=none", f"paths.outputs={tmp_path}"]
    small += ["rules.linear.weight=int4:g32:sym"] if recipe == "w4a16_awq" else []
    first, second = (wrapq.run(recipe, small) for _ in range(2))
    assert first.digests == second.digests
    (note,) = (note for note in first.notes if "saw no input of" in note)
    assert "no calibration token came there; it leaves model.layers." in note
    loaded, model = wrapq.load(first.folder), Qwen2MoeForCausalLM.from_pretrained(folder)
    difference = (loaded(IDS).logits - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert 0 < difference < 0.2


def test_the_plan_says_what_it_scales_of_experts_and_what_not(folder: Path) -> None:
    def plan(rules: str) -> Plan:
        composed = compose([f"recipe={recipe}", f"model.path={folder}", "rules.linear.weight=int4:g32:sym", *rules])
        return resolve(composed.recipe, composed.sources)

    recipe = "w4a16_awq"
    (scale, _), notes = plan([]).stages, plan([]).notes
    assert len(scale.targets) == 2 * (4 + 4)  # two norms, values, the shared expert and four experts
    assert f"{LAYER}.mlp.experts.3.up_proj" in scale.targets and f"{LAYER}.post_attention_layernorm" in scale.targets
    assert notes == ("scale: awq leaves model.norm alone: no linear that reads it has a quantized weight",)
    floating = plan(["+rules.some={match: {name: '*.experts.*'}, quantize: false}"])
    assert not any(".experts." in target for target in floating.stages[0].targets)


@pytest.mark.parametrize("family", ["llama4", "longcat_flash"])
@pytest.mark.parametrize("stack", [{"scale": "awq", "round": "rtn"}, {"scale": "smoothquant", "round": "rtn"}])
def test_transforms_keep_the_function_of_experts_whose_forward_is_their_own(
    family: str, stack: dict[str, str], token_batches: list[Tensor]
) -> None:
    left = dict.fromkeys(("*norm", "lm_head", "*embed*", "*router*"))
    config = PTQConfig("int16:channel", "int16:tensor", left)
    model = build_model(family)
    expected = model(IDS, use_cache=False).logits
    prepared = wrapq.prepare(model, config)
    wrapq.calibrate(prepared, [{"input_ids": ids, "use_cache": False} for ids in (*token_batches, IDS)], stack)
    found = wrapq.convert(prepared)(IDS, use_cache=False).logits
    assert (found - expected).norm() / expected.norm() < 0.005  # more, where a token goes to another expert


@pytest.mark.parametrize("family", ["jetmoe", "dbrx"])
def test_experts_that_cannot_be_taken_apart_are_refused_until_a_rule_leaves_them(family: str, tmp_path: Path) -> None:
    build_model(family, vocab_size=2048).config.save_pretrained(tmp_path)
    overrides = ["recipe=w8a16", f"model.path={tmp_path}", "rules.linear.weight=int8:channel"]
    kind = {"jetmoe": "JetMoeParallelExperts", "dbrx": "DbrxExpertGLU"}[family]
    composed = compose(overrides)
    with pytest.raises(PlanError, match=rf"{kind} keeps experts in one tensor .*\n.*type: {kind}"):
        resolve(composed.recipe, composed.sources)
    composed = compose([*overrides, f"+rules.experts={{match: {{type: {kind}}}, quantize: false}}"])
    left = {row.reason for row in resolve(composed.recipe, composed.sources).untouched if row.type == kind}
    assert left == {"rule experts"}
