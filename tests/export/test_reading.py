"""What transformers reads from an export is the model that was measured."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import wrapq
from tests.export.conftest import APART, CASES, PARAMETERS, Runner, scheme_of
from tests.exports import export_of
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.engine.export import without
from wrapq.engine.measure import measure
from wrapq.engine.record import RunResult
from wrapq.export import reload
from wrapq.export.checks import Translation
from wrapq.export.compressed_tensors import quantization_config, reading
from wrapq.export.reload import Answer
from wrapq.quant.affine import scale_shape
from wrapq.resolve.plan import Plan

SIZE_WITHIN = 0.02


def plan_of(run: RunResult) -> Plan:
    return Plan.model_validate_json((run.folder / "plan.json").read_text())


def read(folder: Path, asymmetric: bool = False) -> nn.Module:
    from transformers import CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
    return reload._load(str(folder), **options)[0]


def perplexity(model: nn.Module, run: RunResult) -> float:
    from transformers import AutoTokenizer

    config = plan_of(run).recipe.evaluation
    source = make_source(config.source, config.options)
    tokenizer = AutoTokenizer.from_pretrained(export_of(run).path)  # the export's own
    samples = build_samples(source, tokenizer, config.tokens // config.seq_len, config.seq_len, seed=None)
    return measure(model, samples, config.batch_size, lambda: None)["perplexity"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_perplexity_through_the_export_is_ours(name: str, exported: Runner) -> None:
    run = exported(name)
    ours = run.metrics["quantized"]["perplexity"]
    if any("leaves the cache of keys and values float" in note for note in export_of(run).notes):
        model = wrapq.load(run.folder)
        with without(model, {"key", "value"}):
            ours = perplexity(model, run)
    theirs = perplexity(read(export_of(run).path, asymmetric=name.endswith("asym")), run)
    # where a reader computes the scales of activations at each forward, a last digit decides roundings to 4 bits
    allowed = max(1e-3 * ours, (ours - run.metrics["float"]["perplexity"]) / 3)
    assert abs(theirs - ours) <= allowed, f"{theirs} through the export, {ours} in the run"
    assert run.metrics["quantized"]["perplexity"] != run.metrics["float"]["perplexity"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_were_compared_before_the_run_ended(name: str, exported: Runner) -> None:
    run = exported(name)
    record = json.loads((run.folder / "run.json").read_text())
    assert record["status"] == "FINISHED"
    ((format_name, found),) = record["exports"].items()
    assert format_name in run.exports and (found["path"], found["error"]) == (
        str(export_of(run).path),
        export_of(run).error,
    )
    figures = found["figures"]
    assert ("float_token_ms" in figures) == (name == APART)
    # of 96 tokens: with inputs of 4 bits last digits, which processors differ in, decide some
    assert (
        figures["top1_agreement"] > (0.85 if name == "nvfp4" else 0.9)
        and 0 < figures["token_ms"] < 5000
        and figures["peak_mb"] > 50
    )
    assert figures["size_mb"] == export_of(run).size / 1e6
    assert export_of(run).error < CASES[name].error


@pytest.mark.parametrize("name", PARAMETERS)
def test_configuration(name: str, exported: Runner) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    run = exported(name)
    config = json.loads((export_of(run).path / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["quantization_status"] == "compressed"
    assert said["format"] == CASES[name].format
    assert said["ignore"] == ([] if name == "w4a8" else ["lm_head"])
    assert (said["kv_cache_scheme"] is not None) == name.endswith("kv8")
    assert config["dtype"] == plan_of(run).recipe.model.dtype
    assert str(run.folder) not in json.dumps(config) and "_name_or_path" not in config
    QuantizationConfig.model_validate(said)


def test_one_scheme_is_said_of_the_type_and_several_of_names(exported: Runner) -> None:
    one = json.loads((export_of(exported("w4a16")).path / "config.json").read_text())["quantization_config"]
    assert one["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "dynamic": False,
                "group_size": 128,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    }
    head = scheme_of("int4:g128")
    said = quantization_config(Translation({"a.q_proj": head, "lm_head": head}, outside=["lm_head"]), ["a.q_proj"])
    assert said["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]  # vLLM's is no Linear
    two = json.loads((export_of(exported("mixed")).path / "config.json").read_text())["quantization_config"]
    groups = {group["format"]: group["targets"] for group in two["config_groups"].values()}
    assert [len(targets) for targets in groups.values()] == [16, 12]
    assert groups["int-quantized"][0] == "model.layers.0.mlp.gate_proj"


@pytest.mark.slow
def test_an_asymmetric_export_says_how_to_load_it(exported: Runner) -> None:
    notes = exported("w4a16_asym").notes
    if not notes:
        pytest.skip("this version of transformers loads it as it is")
    (note,) = notes
    assert f"compressed-tensors {version('compressed-tensors')} loads it with" in note
    assert "quantization_config=CompressedTensorsConfig(dequantize=True) only" in note


def test_a_cache_that_the_reader_leaves_float_is_said(exported: Runner) -> None:
    from compressed_tensors.quantization.lifecycle import initialize
    from transformers import AutoModelForCausalLM

    run = exported("static_kv8")
    attention = AutoModelForCausalLM.from_config(read(export_of(run).path).config).model.layers[0].self_attn
    seen = initialize.is_cached_attention_module(attention)
    said = [note for note in export_of(run).notes if "leaves the cache of keys and values float" in note]
    assert len(said) == (0 if seen else 1)


def test_what_a_reader_leaves_out_and_how_it_had_to_load_are_both_said() -> None:
    logits, _, _, notes, left_float = reading(Answer({"dequantized, float cache": torch.zeros(1)}))
    assert (len(notes), left_float, len(logits)) == (2, {"key", "value"}, 1)
    assert reading(Answer({"plain": logits}))[3:] == ((), frozenset())


def test_it_generates_with_its_own_tokenizer(exported: Runner) -> None:
    from transformers import AutoTokenizer

    folder = export_of(exported("static_kv8")).path
    tokenizer, model = AutoTokenizer.from_pretrained(folder), read(folder)
    ids = tokenizer("The quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]


def ideal_bytes(run: RunResult) -> float:
    """Bits of the quantized weights, their scales and zero points, and everything else in its own dtype."""
    plan, dtype = plan_of(run), getattr(torch, plan_of(run).recipe.model.dtype)
    total = plan.model.parameters * dtype.itemsize
    scales = {"float32": dtype.itemsize, "fp8_e4m3": 1, "e8m0": 1}
    for module in plan.modules:
        spec = next((point.quant_spec for point in module.points if point.role == "weight"), None)
        if spec is None:
            continue
        weights, groups = math.prod(module.weight_shape), math.prod(scale_shape(module.weight_shape, spec))
        zero_points = 0 if spec.symmetric else spec.dtype.bits / 8
        total += weights * (spec.dtype.bits / 8 - dtype.itemsize) + groups * (scales[spec.scale_dtype] + zero_points)
    return total


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_what_the_bits_cost(name: str, exported: Runner) -> None:
    run = exported(name)
    ours, theirs = (folder / "model.safetensors" for folder in (run.folder, export_of(run).path))
    sizes = {"ideal": ideal_bytes(run), "ours": ours.stat().st_size, "export": theirs.stat().st_size}
    assert all(abs(size / sizes["ideal"] - 1) <= SIZE_WITHIN for size in sizes.values()), sizes
