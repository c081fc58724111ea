"""What is saved comes back to the bit, and what is damaged is refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import build_model
from wrapq import PTQConfig, convert, load, prepare
from wrapq.errors import ModelError
from wrapq.runs.checkpoint import WEIGHTS, qparams_tensors, save_model, tensors_digest
from wrapq.runs.folder import MANIFEST, RunFolder
from wrapq.runtime.module import QuantizedModule

IDS = torch.arange(3, 21).reshape(2, 9)
MIXED = PTQConfig(
    weight="int4:g32:sym",
    activations="uint8:tensor:asym",
    overrides={"*.down_proj": {"input": "int8:token:dyn"}, "*norm": {"weight": "int16:tensor"}, "lm_head": None},
)


def quantized(config: PTQConfig = MIXED, **changes: object) -> nn.Module:
    model = prepare(build_model("llama", **changes), config)
    model(input_ids=IDS)
    return convert(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(quantized(), RunFolder(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_same_bits_same_tensors_same_specs(saved: Path):
    model, loaded = quantized(), load(saved)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    expected = {n: m.specs for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert {n: m.specs for n, m in loaded.named_modules() if isinstance(m, QuantizedModule)} == expected
    assert tensors_digest(loaded.state_dict()) == tensors_digest(model.state_dict())
    assert tensors_digest(qparams_tensors(loaded)) == tensors_digest(qparams_tensors(model))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))


def test_saved_again_it_is_the_same_file(saved: Path, tmp_path: Path):
    save_model(load(saved), RunFolder(tmp_path))
    assert (tmp_path / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / MANIFEST).read_text()) == json.loads((saved / MANIFEST).read_text())


def test_how_it_generates_comes_back(folder: Path):
    own = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = load(folder).generation_config
    assert {key: getattr(found, key) for key in own} == own
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        load(folder)


def test_only_safetensors_and_json(saved: Path):
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}
    assert not [file for file in saved.iterdir() if file.name.endswith(".partial")]


def test_activations_only(tmp_path: Path):
    model = quantized(PTQConfig(weight=None)).to(torch.float32)
    save_model(model, RunFolder(tmp_path))
    assert torch.equal(load(tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path):
    model = quantized(PTQConfig(weight="int8:channel:sym"), tie_word_embeddings=True)
    save_model(model, RunFolder(tmp_path))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["tied"]["lm_head.weight_packed"] == "model.embed_tokens.weight_packed"
    loaded = load(tmp_path)
    for one in (model, loaded):
        embedding, head = one.model.embed_tokens, one.lm_head
        assert embedding.weight_packed is head.weight_packed and embedding.weight_scale is head.weight_scale
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_tied_weights_left_float_stay_tied(tmp_path: Path):
    overrides = {"lm_head": {"weight": "float"}, "embed_tokens": {"weight": "float"}}
    model = quantized(PTQConfig(overrides=overrides), tie_word_embeddings=True)
    save_model(model, RunFolder(tmp_path))
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def unquantize_unknown(folder: Path) -> None:
    modules = json.loads((folder / MANIFEST).read_text())["modules"]
    edit(folder / MANIFEST, modules=modules | {"model.layers.7.mlp": {"input": "int8:tensor"}})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / WEIGHTS, -100), "changed or damaged"),
    "a flipped bit in the header": (lambda f: flip(f / WEIGHTS, 40), r"cannot be read|changed or damaged"),
    "a truncated file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors cannot be read"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no quantized model"),
    "a manifest that is no JSON": (lambda f: (f / MANIFEST).write_text("{"), "holds no quantized model"),
    "a manifest that is a list": (
        lambda f: (f / MANIFEST).write_text("[]"),
        "manifest.json does not hold what a run writes",
    ),
    "a later format": (lambda f: edit(f / MANIFEST, format=99), "has format 99; this version reads 1"),
    "a manifest that lacks a key": (lambda f: edit(f / MANIFEST, tied=None), "lacks tied"),
    "a manifest of another model": (unquantize_unknown, "do not belong together"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "a config with fewer layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=1, layer_types=None),
        "do not belong together",
    ),
    "a config with more layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=3, layer_types=None),
        r"lacks model\.layers\.2",
    ),
    "a config of another width": (lambda f: edit(f / "config.json", hidden_size=32), "do not belong together"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_the_reason(name: str, folder: Path):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_the_folder_of_a_failed_run_says_why(tmp_path: Path):
    RunFolder(tmp_path).write_status("FAILED", reason="CalibrationError: lm_head.input: the data holds NaN")
    with pytest.raises(ModelError, match=r"the run is FAILED: CalibrationError: lm_head\.input"):
        load(tmp_path)


def test_no_folder_at_all(tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere holds no quantized model"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds no quantized model"):
        load(str(tmp_path))
