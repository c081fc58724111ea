"""Checkpoints that are quantized already are refused in the plan with what they are, or taken apart when asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wrapq
from tests.exports import export_of
from tests.models import DEMO, random_model, without_weights
from wrapq.engine.progress import Progress
from wrapq.engine.replay import verify
from wrapq.errors import ModelError, PlanError
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import ModelConfig
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.resolve import resolve
from wrapq.resolve.stored import describe
from wrapq.runs.checkpoint import load_float

SMALL = ("tracking=none", "evaluation.tokens=128", "evaluation.seq_len=64", "runtime.kernels=reference")
WEIGHT = "rules.linear.weight=int4:g32:sym"
CPU = torch.device("cpu")
IDS = torch.arange(3, 35)[None]
BLOCK = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with an export."""
    out = tmp_path_factory.mktemp("runs")
    small = [*SMALL, WEIGHT, f"model.path={random_model('llama', out / 'model')}", f"paths.outputs={out}"]
    return wrapq.run("w4a16_rtn", [*small, "export=compressed_tensors", "export.compressed_tensors.beside_float=false"])


def source(path: Path, dequantize: bool = True) -> ModelSource:
    return ModelSource(ModelConfig(path=str(path), dequantize=dequantize))


def refusal(path: Path, dequantize: bool = False) -> str:
    with pytest.raises(PlanError) as error:
        source(path, dequantize).meta_model()
    return str(error.value)


def in_blocks(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The shipped model with its projections in blocks of fp8, as DeepSeek lays them out, and their values."""
    shutil.copytree(DEMO, folder)
    stored, values = {}, {}
    for name, weight in load_file(DEMO / "model.safetensors").items():
        stored[name] = values[name] = weight
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            padded = nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
            blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N / b, b, K / b, b]
            scale = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            whole = (codes.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
            stored[name] = codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
            stored[f"{name}_scale_inv"], values[name] = scale, whole[:rows, :columns].to(weight.dtype)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    without_weights(folder, quantization_config=said)
    return folder, values


def test_fp8_in_blocks(tmp_path: Path) -> None:
    folder, values = in_blocks(tmp_path / "fp8")
    assert refusal(folder) == (
        f"1 problem in the plan:\n  - model.path: {folder} is quantized already: fp8 (e4m3, blocks of 64x64)\n"
        "    give the float model that it was made from, or start from what it is when taken apart: "
        "model.dequantize=true"
    )
    model = load_float(source(folder), CPU)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight, values[name].to(weight.dtype), rtol=1e-2, atol=1e-8
        )  # as some is rounded to bfloat16
    assert not hasattr(model.config, "quantization_config") and type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_an_export_and_the_run_that_it_is_of(run: Any) -> None:
    assert "compressed-tensors (pack-quantized, 4 bits)" in refusal(export_of(run).path)
    assert "a run of wrapq (int4:g32:sym)" in refusal(run.folder)
    expected = wrapq.load(run.folder)(IDS).logits
    for path in (export_of(run).path, run.folder):
        model = load_float(source(path), CPU)
        assert torch.equal(model(IDS).logits, expected)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_of_what_was_taken_apart_is_verified_and_evaluated(run: Any, tmp_path: Path) -> None:
    path = [f"model.path={export_of(run).path}", "model.dequantize=true"]
    again = wrapq.run("w4a16_rtn", [*path, *SMALL, WEIGHT, f"paths.outputs={tmp_path}"])
    composed = compose(["recipe=w4a16_rtn", WEIGHT, *path])
    assert "float here is what comes out of it: compressed-tensors (pack-quantized, 4 bits)" in str(
        resolve(composed.recipe, composed.sources).notes
    )
    assert again.digests["model"] != run.digests["model"]
    assert "quantization_config" not in json.loads((again.folder / "config.json").read_text())
    assert not verify(str(again.folder), [], (), Progress()).failures


def test_a_float_checkpoint_is_not_taken_apart_and_blocks_are_not_streamed(run: Any) -> None:
    assert "model.dequantize: nothing to take apart: the weights of" in refusal(DEMO, dequantize=True)
    path = [f"model.path={export_of(run).path}", "model.dequantize=true", "runtime.load=streaming"]
    with pytest.raises(PlanError, match=r"runtime\.load: streaming: a checkpoint that is quantized already"):
        wrapq.run("w4a16_rtn", [*path, *SMALL, WEIGHT])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (4 bits, groups of 128)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bits)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (NVFP4)"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto (int8)"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_methods_in_words(section: Mapping[str, Any], said: str) -> None:
    assert describe(section) == said


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"quant_method": "unheard_of", "bits": 3}, "transformers does not know unheard_of"),
        ({"quant_method": "quanto", "weights": "int8"}, "transformers does not take quanto apart"),
    ],
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_what_nobody_takes_apart_is_refused_either_way(
    section: Mapping[str, Any], reason: str, dequantize: bool, tmp_path: Path
) -> None:
    said = refusal(without_weights(tmp_path / "model", quantization_config=section), dequantize)
    assert said.endswith(f"{describe(section)}; {reason}\n    give the float model that it was made from")


def test_what_only_other_files_or_the_weights_themselves_say(tmp_path: Path) -> None:
    folder, _ = in_blocks(tmp_path / "fp8")
    shutil.copy(DEMO / "config.json", folder)
    assert "its weights are F8_E4M3; nothing here takes that apart" in refusal(folder)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert "as hf_quant_config.json says (FP8); nothing here takes that apart" in refusal(folder)


def test_weights_that_do_not_come_out_as_floats_are_refused(run: Any) -> None:
    tensors = dict(load_float(source(run.folder), CPU).state_dict())
    for change, said in (
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
        ({"model.norm.bias": torch.zeros(64)}, "the model has no model.norm.bias"),
    ):
        with pytest.raises(ModelError, match=said):
            source(run.folder).filled(tensors | change, CPU)


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    model = random_model("llama", tmp_path / "float", tie_word_embeddings=False, num_key_value_heads=4)
    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    codes = {}
    for name, tensor in tensors.items():
        known = names.get_name(name, try_suffixes=(".weight",))
        if tensor.dim() == 1:
            writer.add_tensor(known, tensor.numpy())
            continue
        packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
        codes[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        writer.add_tensor(known, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert f"{path} is quantized already: a GGUF file (Q8_0)" in refusal(path)
    found = dict(load_float(source(path), CPU).named_parameters())
    assert found.keys() == tensors.keys()
    for name in (name for name in codes if "self_attn" not in name):  # whose rows are in another order there
        torch.testing.assert_close(found[name], codes[name])
