"""Finished runs: what MLflow and the folder hold, that they repeat to the bit, and the model families they serve."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

import wrapq
from tests.conftest import LLAMA_LIKE
from tests.engine.conftest import TOKEN
from tests.engine.record import SMALL, recorded
from tests.models import random_model
from wrapq.engine.measure import forward_logits
from wrapq.engine.record import RunResult
from wrapq.errors import WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.runs.checkpoint import tensors_digest
from wrapq.runtime.module import QuantizedModule
from wrapq.tracking.base import flatten

TOKEN_TEXT = "hf_" + "abcdefghijklmnopqrstuvwx"


def run_small(recipe: str, outputs: Path, *overrides: str) -> RunResult:
    return wrapq.run(recipe, [*SMALL, "tracking=none", f"paths.outputs={outputs}", *overrides])


def check_points(result: RunResult) -> nn.Module:
    """Every point of the plan is in the loaded model, and nothing else is quantized; returns the model."""
    plan = Plan.model_validate_json((result.folder / "plan.json").read_text())
    model = wrapq.load(result.folder)
    loaded = {name: dict(m.specs) for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert loaded == plan.specs()
    for name, specs in loaded.items():
        held = model.get_submodule(name).state_dict()
        for point, spec in specs.items():
            assert spec.dynamic or f"{point}_scale" in held, f"{name}.{point}"
    return model


# --- the record


def test_record_has_every_parameter_of_the_recipe(finished: RunResult, outputs: Path) -> None:
    run = recorded(outputs / "runs.db")
    recipe = compose(["recipe=demo", *SMALL]).recipe
    assert run.data.params.keys() == dict(flatten(recipe.model_dump())).keys()
    assert run.data.params["evaluation.tokens"] == "512"
    assert run.data.params["rules.head.quantize"] == "False"
    assert run.data.params["stack.round.algorithm"] == "rtn"


def test_record_has_digests_and_versions(finished: RunResult, outputs: Path) -> None:
    run = recorded(outputs / "runs.db")
    assert run.info.status == "FINISHED"
    assert run.info.run_id == finished.run_id
    tags = run.data.tags
    for name, digest in finished.digests.items():
        assert tags[f"digest.{name}"] == digest
    assert finished.digests.keys() == {
        "recipe",
        "plan",
        "model",
        "calibration",
        "evaluation",
        "qparams",
        "tensors",
        "outputs",
    }
    assert tags["version.wrapq"] == wrapq.__version__
    assert {"version.torch", "version.transformers", "version.python", "device"} <= tags.keys()
    assert tags["folder"] == str(finished.folder.resolve())


def test_record_has_metrics_per_stage(finished: RunResult, outputs: Path) -> None:
    metrics = recorded(outputs / "runs.db").data.metrics
    for stage in ("float", "weights", "quantized"):
        assert metrics[f"{stage}/perplexity"] == pytest.approx(finished.metrics[stage]["perplexity"])
    for stage in ("weights", "quantized"):
        assert {f"{stage}/kl", f"{stage}/top1_agreement"} <= metrics.keys()
    assert metrics["size/quantized_mb"] == finished.sizes["quantized"] / 1e6
    assert {"size/float_mb", "bits_per_weight", "seconds/total", "seconds/calibrate"} <= metrics.keys()


def test_record_has_curves_over_layers(finished: RunResult, outputs: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs / 'runs.db'}")
    for curve in ("layer/sqnr_db", "layer/relative_error", "weight_sqnr_db/mlp.down_proj"):
        points = client.get_metric_history(finished.run_id, curve)
        assert [point.step for point in points] == [0, 1, 2, 3], curve
        assert all(math.isfinite(point.value) for point in points)


def test_record_has_both_data_sets(finished: RunResult, outputs: Path) -> None:
    inputs = recorded(outputs / "runs.db").inputs.dataset_inputs
    found = {tag.value: data for data in inputs for tag in data.tags if tag.key == "mlflow.data.context"}
    assert found.keys() == {"calibration", "evaluation"}
    for context, data in found.items():
        assert {tag.key: tag.value for tag in data.tags}["digest"] == finished.digests[context]
    assert json.loads(found["calibration"].dataset.profile) == {"tokens": 1024, "windows": 4, "seq_len": 256}
    assert found["evaluation"].dataset.name == "demo/heldout"


def test_record_has_artifacts(finished: RunResult, outputs: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs / 'runs.db'}")
    names = {file.path for file in client.list_artifacts(finished.run_id)}
    texts = {"recipe.yaml", "plan.json", "recipe.lock.yaml", "manifest.json", "modules.json", "log.txt"}
    assert names >= texts | {"qparams.safetensors", "statistics.safetensors"}
    assert "model.safetensors" not in names  # the weights stay where the run put them


def test_no_secret_is_written_anywhere(finished: RunResult, outputs: Path) -> None:
    for path in outputs.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> RunResult:
    """A run with a secret in the address of its store, and another in its recipe."""
    folder = tmp_path_factory.mktemp("secretive")
    new_store(folder / "runs.db")
    text = (Path(__file__).resolve().parents[2] / "recipes" / "w8a16.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("description: ", f"description: made with {TOKEN_TEXT}, "))
    uri = f"sqlite:///{folder}/runs.db?password=swordfish123"
    return wrapq.run(
        f"{folder}/mine.yaml", ["evaluation.tokens=256", f"paths.outputs={folder}", f"tracking.uri='{uri}'"]
    )


def test_secrets_in_the_settings_do_not_reach_the_record(secretive: RunResult) -> None:
    outputs = secretive.folder.parents[1]
    for path in [*secretive.folder.iterdir(), *(outputs / "mlartifacts").rglob("*")]:
        assert path.is_dir() or b"swordfish123" not in path.read_bytes(), path
    recipe = yaml.safe_load((secretive.folder / "recipe.lock.yaml").read_text())["recipe"]
    assert not {"tracking", "runtime", "paths"} & recipe.keys()


def test_a_secret_in_a_preset_stays_in_the_recipe(secretive: RunResult) -> None:
    """The recipe of a run is what replays it, word for word; no log, page, parameter or tag repeats the secret."""
    files = [path for path in secretive.folder.iterdir() if path.is_file()]
    holding = {path.name for path in files if TOKEN_TEXT.encode() in path.read_bytes()}
    assert holding <= {"recipe.yaml", "recipe.lock.yaml", "plan.json"}
    run = recorded(secretive.folder.parents[1] / "runs.db")
    assert TOKEN_TEXT not in str(run.data.params) + str(run.data.tags)


def test_without_tracking_there_is_no_database(tmp_path: Path) -> None:
    result = run_small("demo", tmp_path)
    assert result.run_id is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "demo"]


# --- the numbers


@pytest.mark.slow
def test_equal_in_two_processes(tmp_path: Path) -> None:
    """A run in this process and one in another, each in a folder of its own."""
    options = [*SMALL, "tracking=none", "runtime.threads=1"]
    before = torch.get_num_threads()
    command = [sys.executable, "-m", "wrapq", "run", *options, f"paths.outputs={tmp_path / 'b'}"]
    other = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wrapq.run("demo", [*options, f"paths.outputs={tmp_path / 'a'}"])
    torch.set_num_threads(before)
    assert other.wait() == 0
    locks = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.glob("*/demo/*/recipe.lock.yaml"))]
    assert len(locks) == 2
    assert locks[0] == locks[1]
    assert {"qparams", "outputs", "code"} <= locks[0]["digests"].keys()


def test_loaded_model_has_the_outputs_of_the_run(finished: RunResult) -> None:
    model, tokenizer = wrapq.load(finished.folder), AutoTokenizer.from_pretrained(finished.folder)
    ids = tokenizer("Return a new list that holds the items", return_tensors="pt").input_ids
    with torch.no_grad():
        once, again = (forward_logits(m, ids) for m in (model, wrapq.load(finished.folder)))
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(once, again)
    assert generated.shape == (1, ids.shape[1] + 4)


def test_output_digest_is_that_of_the_loaded_model(finished: RunResult) -> None:
    from wrapq.data.samples import build_samples
    from wrapq.data.sources.base import make_source

    tokenizer = AutoTokenizer.from_pretrained(finished.folder)
    samples = build_samples(make_source("demo", {"split": "heldout"}), tokenizer, 2, 256, seed=None)
    assert samples.digest == finished.digests["evaluation"]
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as `auto` chose
    with torch.no_grad():
        logits = forward_logits(wrapq.load(finished.folder, device), samples.input_ids[:1, :128].to(device))
    assert tensors_digest({"logits": logits}) == finished.digests["outputs"]


def test_quality_of_the_default_recipe(finished: RunResult) -> None:
    base, quantized = finished.metrics["float"], finished.metrics["quantized"]
    assert quantized["perplexity"] == pytest.approx(base["perplexity"], rel=0.05)
    assert 0 < quantized["kl"] < 0.05
    assert quantized["top1_agreement"] > 0.85
    assert finished.sizes["quantized"] < 0.5 * finished.sizes["float"]


def test_padded_samples_run_too(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Return a list.|Return the number of items in the list that is given.|No.")
    text = ("calibration=text", f"calibration.path={tmp_path / 'lines.txt'}", "calibration.pack=false")
    result = run_small("w8a8_static", tmp_path / "out", *text, '+calibration.separator="|"')
    assert result.notes == (
        f"calibration: text:{tmp_path / 'lines.txt'} gives 3 samples of 256 tokens, 4 were asked for",
    )


def test_a_model_without_a_tokenizer_runs_on_token_ids(tmp_path: Path) -> None:
    model = random_model("llama", tmp_path / "model", vocab_size=3000)  # more than the shipped tokenizer has
    for file in model.glob("tokenizer*"):
        file.unlink()
    ids = torch.arange(2900, 3000).repeat(3)[:256].reshape(4, 64)
    files = {part: tmp_path / f"{part}.safetensors" for part in ("calibration", "evaluation")}
    given = [f"model.path={model}", *(f"{part}=tokens" for part in files)]
    given += [f"{part}.path={path}" for part, path in files.items()] + [f"{part}.seq_len=64" for part in files]
    for offset, path in enumerate(files.values()):
        save_file({"ids": ids - offset}, path)
    result = run_small("w8a8_static", tmp_path / "out", *given)
    assert any("no tokenizer" in note for note in result.notes)
    assert wrapq.load(result.folder) and not list(result.folder.glob("tokenizer*"))
    save_file({"ids": ids + 1}, files["evaluation"])
    with pytest.raises(WrapqError, match=r"3000 is outside the vocabulary \(0 to 2999\)"):
        run_small("w8a8_static", tmp_path / "out", *given)
    with pytest.raises(WrapqError, match="cannot read the tokenizer"):
        run_small("w8a8_static", tmp_path / "out", f"model.path={model}")


def test_calibrating_on_what_is_measured_is_noted(tmp_path: Path) -> None:
    import numpy

    numpy.save(tmp_path / "rows.npy", numpy.arange(4 * 64).reshape(4, 64) % 2048)
    shared = [f"{part}={value}" for part in ("calibration", "evaluation") for value in ["tokens"]]
    shared += [f"{part}.path={tmp_path / 'rows.npy'}" for part in ("calibration", "evaluation")]
    shared += ["calibration.seq_len=64", "evaluation.seq_len=64", "calibration.samples=1", "evaluation.tokens=64"]
    shared += ["evaluation.batch_size=1"]
    rows = numpy.load(tmp_path / "rows.npy")[:1]
    numpy.save(tmp_path / "rows.npy", rows)
    result = wrapq.run("w8a8_static", [*shared, "tracking=none", f"paths.outputs={tmp_path / 'out'}"])
    assert "calibration and evaluation read the same tokens: the quality measured is too good" in result.notes


# --- families


PLAIN = {("llama", "w8a8_static"), ("qwen3", "int16_activations")}
"""Said of each recipe and of each kind of block; the others are slow."""
PAIRS = [(family, recipe) for family in LLAMA_LIKE for recipe in ("w8a8_static", "int16_activations")]


@pytest.mark.parametrize(
    ("family", "recipe"), [pytest.param(*pair, marks=() if pair in PLAIN else pytest.mark.slow) for pair in PAIRS]
)
def test_families_run_and_reload(family: str, recipe: str, tmp_path: Path) -> None:
    path = random_model(family, tmp_path / family)
    result = run_small(recipe, tmp_path / "out", "model=hf", f"model.path={path}")
    model = check_points(result)
    linears = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    for layer in range(2):
        inside = {name.rpartition(".")[2] for name in found if name.startswith(f"model.layers.{layer}.")}
        assert linears <= inside
        if recipe == "int16_activations":
            norms = {"input_layernorm", "post_attention_layernorm"} | (
                {"q_norm", "k_norm"} if family == "qwen3" else set()
            )
            assert norms | {"self_attn", "mlp", "act_fn"} <= inside
    if recipe == "int16_activations":
        assert {"model.embed_tokens", "model.norm", "lm_head"} <= found.keys()
    assert abs(result.metrics["quantized"]["kl"]) < 0.05


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    path = random_model(family, tmp_path / family, tie_word_embeddings=True)
    result = run_small("int16_activations", tmp_path / "out", "model=hf", f"model.path={path}")
    model = check_points(result)
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    own, other = embedding.state_dict(), head.state_dict()
    shared = ["weight_packed", "weight_scale"]
    assert all(own[name].data_ptr() == other[name].data_ptr() for name in shared)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_models(dtype: str, tmp_path: Path) -> None:
    result = run_small("w8a8_static", tmp_path, f"model.dtype={dtype}")
    assert check_points(result).dtype == getattr(torch, dtype)
    assert result.metrics["quantized"]["perplexity"] == pytest.approx(result.metrics["float"]["perplexity"], rel=0.02)


def test_a_model_without_blocks_of_its_own_kind_gpt2(tmp_path: Path) -> None:
    path = random_model("gpt2", tmp_path / "gpt2", n_positions=512, tie_word_embeddings=True)
    result = run_small("w8a8_static", tmp_path / "out", "model=hf", f"model.path={path}", "~rules.head",
                       'rules.linear.match.name="transformer.*"')  # fmt: skip
    check_points(result)


# --- real models


@pytest.mark.slow
def test_w8a8_static_on_a_real_llama_is_within_a_percent(shared_models: Path, tmp_path: Path) -> None:
    path = shared_models / "tiny-llama-docs"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    overrides = ["model=hf", f"model.path={path}", "calibration.samples=16", "evaluation.tokens=8192"]
    result = wrapq.run("w8a8_static", [*overrides, "tracking=none", f"paths.outputs={tmp_path}"])
    assert result.metrics["quantized"]["perplexity"] == pytest.approx(result.metrics["float"]["perplexity"], rel=0.01)
