"""Exports of finished runs, exports that are wrong, and folders that are whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import wrapq
from tests.export.conftest import HERE, SMALL, ReadHere, Runner, weights
from tests.exports import export_of
from tests.models import DEMO
from wrapq.cli import main
from wrapq.engine.export import export_run
from wrapq.engine.progress import Progress
from wrapq.errors import ModelError, OutputError, PlanError
from wrapq.export.base import EXPORTERS
from wrapq.export.compressed_tensors import CompressedTensors
from wrapq.recipe.schema import Export, Settings

FORMAT = {"compressed_tensors": Export()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EXPORTERS.register("one_scale_wrong")
class OneScaleWrong(ReadHere):
    """Writes the scale of one layer doubled."""

    def export(self, model, plan, folder) -> None:
        super().export(model, plan, folder)
        path = folder.path / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.2.mlp.up_proj.weight_scale"] *= 2
        save_file(tensors, path, metadata={"format": "pt"})


@EXPORTERS.register("one_tensor_lost")
class OneTensorLost(CompressedTensors):
    """Leaves the packed weight of one layer out."""

    def export(self, model, plan, folder) -> None:
        super().export(model, plan, folder)
        path = folder.path / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.2.mlp.up_proj.weight_packed"]
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.slow  # the plain tests export later, too; this one compares every byte
def test_it_is_the_same_bytes_later(exported: Runner, tmp_path: Path) -> None:
    run, target = exported("w4a16"), tmp_path / "later"
    options = ["export=compressed_tensors", "export.compressed_tensors.beside_float=false", "--to", str(target)]
    result = CliRunner().invoke(main, ["export", str(run.folder), *options])
    assert result.exit_code == 0, result.output
    assert str(target) in result.output.replace("\n", "")
    assert files_of(target) == files_of(export_of(run).path)
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(files_of(target))
    again = CliRunner().invoke(main, ["export", str(run.folder), *options])
    assert again.exit_code == OutputError.exit_code and "exists already" in again.output


def test_a_wrong_scale_is_found_and_nothing_is_left(exported: Runner) -> None:
    folder = exported("w4a16").folder
    before = files_of(folder)
    with pytest.raises(ModelError, match="the one_scale_wrong export loads, but computes something else"):
        export_run(str(folder), {"one_scale_wrong": Export()}, Settings(), Progress())
    assert files_of(folder) == before
    assert not (folder / "export" / ".one_scale_wrong.partial").exists()


def test_a_lost_tensor_is_found(exported: Runner) -> None:
    folder = exported("w4a16").folder
    with pytest.raises(ModelError, match=r"does not load the export: .*model\.layers\.2\.mlp\.up_proj\.weight_packed"):
        export_run(str(folder), {"one_tensor_lost": Export()}, Settings(), Progress())


def test_the_plan_is_asked_again(exported: Runner) -> None:
    run = exported("w4a16")
    plan = (run.folder / "plan.json").read_text()
    copy = run.folder.parent / "nine"
    shutil.copytree(run.folder, copy)
    (copy / "plan.json").write_text(plan.replace("int4:g128", "int9:g128"))
    try:
        with pytest.raises(PlanError, match="numbers of at most 8 bits"):
            export_run(str(copy), FORMAT, Settings(), Progress())
    finally:
        shutil.rmtree(copy)


def test_the_command_says_what_it_takes() -> None:
    result = CliRunner().invoke(main, ["export", "x", "rules.linear.weight=int4"])
    assert result.exit_code == 2
    assert "rules.linear.weight=int4: a finished run takes only export, runtime, paths" in result.output
    result = CliRunner().invoke(main, ["export", "x"])
    assert result.exit_code == PlanError.exit_code and "say which: export=aot_inductor, export=awq, " in result.output


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = tmp_path / "tied"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=2048, tie_word_embeddings=True, num_key_value_heads=2, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(Path(wrapq.__file__).parent / "assets" / "demo").save_pretrained(model)
    recipe, *overrides = weights("int4:g32:sym")
    chosen = [
        *overrides,
        *SMALL,
        *HERE,
        "model=hf",
        f"model.path={model}",
        f"paths.outputs={tmp_path}",
        "evaluation.tokens=256",
    ]
    run = wrapq.run(recipe.removeprefix("recipe="), chosen)
    tensors = load_file(export_of(run).path / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    assert export_of(run).error < 1e-6


@pytest.mark.slow
def test_without_the_float_model_the_export_is_measured_alone(exported: Runner, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(exported("w4a16").folder, copy)
    (bare := tmp_path / "without weights").mkdir()
    shutil.copy(DEMO / "config.json", bare)
    plan = (copy / "plan.json").read_text()
    (copy / "plan.json").write_text(plan.replace('"wrapq://demo"', f'"{bare}"'))
    done = export_run(str(copy), FORMAT, Settings(), Progress())["compressed_tensors"]
    assert "token_ms" in done.figures and not any(name.startswith("float_") for name in done.figures)
    assert any(note.startswith("the float model is not measured beside it: ") for note in done.notes)
    assert not list(done.path.parent.glob(".float-*"))
