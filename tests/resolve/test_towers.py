"""A model for images and text that is run as a language model: its towers stay float unless a rule names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import wrapq
from tests.conftest import build_model
from tests.exports import export_of
from tests.models import saved
from wrapq.graph.blocks import find_blocks
from wrapq.graph.towers import find_towers
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runtime.module import QuantizedModule

TOWERS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual",),
}
FILES = {"processor_config.json": "{}", "preprocessor_config.json": '{"size": 56}', "chat_template.jinja": "{{ 1 }}"}
SMALL = ("tracking=none", "evaluation.tokens=128", "evaluation.seq_len=64", "runtime.kernels=reference")


def build(family: str) -> nn.Module:
    """A model whose vision tower has more layers, and more parameters, than its language model."""
    text: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    if family == "qwen2_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        sizes = {"depth": 4, "embed_dim": 128, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
        ids = {f"{kind}_token_id": 2000 for kind in ("image", "video", "vision_start", "vision_end")}
        qwen = transformers.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=sizes, **ids)
        return transformers.Qwen2VLForConditionalGeneration(qwen).eval()
    ids = {"image_token_index": 2000}
    if family == "llava":
        parts = {"text_config": transformers.LlamaConfig(**text).to_dict()}
        parts["vision_config"] = vision | {"model_type": "clip_vision_model", "projection_dim": 64}
        return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, **ids)).eval()
    parts = {"text_config": transformers.Gemma3TextConfig(**text, head_dim=16, sliding_window=32).to_dict()}
    parts["vision_config"] = vision | {"model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(**parts, **ids, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def planned(path: Path, *overrides: str) -> Plan:
    composed = compose(["recipe=w8a8_static", f"model.path={path}", *overrides])
    return resolve(composed.recipe, composed.sources)


@pytest.mark.parametrize("family", TOWERS)
def test_what_lies_beside_the_language_model(family: str) -> None:
    model = build(family)
    assert find_towers(model) == TOWERS[family]
    assert find_blocks(model).names() == tuple(f"model.language_model.layers.{i}" for i in range(2))


@pytest.mark.parametrize("family", ["llama", "gemma3", "bart", "mixtral"])
def test_nothing_lies_beside_a_model_for_text(family: str) -> None:
    assert find_towers(build_model(family)) == ()


def test_rules_reach_a_tower_by_its_name_alone(tmp_path: Path) -> None:
    path = saved(build("llava"), tmp_path)
    for rule in ("{type: Linear}", "{name: '*_proj'}", "{name: '*', type: Linear}", "{layers: '0:', type: Linear}"):
        plan = planned(path, f"rules.linear.match={rule}")
        assert plan.modules and not [m.name for m in plan.modules if m.name.startswith(TOWERS["llava"])]
    assert f"{', '.join(TOWERS['llava'])}: beside the language model, float unless a rule names them" in plan.notes
    left = {row.name: row.reason for row in plan.untouched}
    assert left["model.multi_modal_projector.linear_1"].startswith("no rule names it; beside the language model")

    tower = "{match: {name: '*.vision_tower.*', type: Linear}, weight: 'int8:channel', input: 'int8:tensor'}"
    named = planned(path, f"+rules.tower={tower}")
    reached = [m for m in named.modules if m.name.startswith("model.vision_tower")]
    assert len(reached) == 4 * 6 and all([p.name for p in m.points] == ["weight"] for m in reached)
    assert any("no forward of tokens comes there" in note for note in named.notes)


def test_a_run_and_its_export_take_the_processor_along(tmp_path: Path) -> None:
    model = build("llava")
    path = saved(model, tmp_path / "model")
    for name, text in FILES.items():
        (path / name).write_text(text)
    export = ["export=compressed_tensors", "export.compressed_tensors.beside_float=false"]
    more = ["calibration.samples=2", "calibration.seq_len=32", *export, f"paths.outputs={tmp_path}"]
    run = wrapq.run("w8a8_static", [f"model.path={path}", *SMALL, *more])
    assert export_of(run).error < 1e-6
    for folder in (run.folder, export_of(run).path):
        assert {name: (folder / name).read_text() for name in FILES} == FILES
    loaded = wrapq.load(run.folder)
    quantized = [name for name, module in loaded.named_modules() if isinstance(module, QuantizedModule)]
    assert len(quantized) == 14 and all(name.startswith("model.language_model.layers") for name in quantized)
    before, after = model.model.vision_tower.state_dict(), loaded.model.vision_tower.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
