"""A recipe's rule that hands the head of the shipped model to PT2E: planned, refused, run, loaded, exported, diffed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import wrapq
from tests.models import random_model
from tests.pt2e.test_parts import by_hand
from wrapq.cli import main
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.engine.plan_diff import Side, find_differences
from wrapq.engine.preflight import check_machine
from wrapq.errors import ModelError, PlanError
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import ModelConfig
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.runtime.graph_program import GraphProgram

pytest.importorskip("torchao")

PART = "+rules.part={match: {name: lm_head}, by: pt2e, quantizer: xnnpack}"
SMALL = ("evaluation.tokens=512", "calibration.samples=8", "calibration.seq_len=32", "calibration.batch_size=4")
DEMO = ("recipe=w8a8_static", "~stack.smooth", "algorithm@stack.round=rtn", *SMALL)


def planned(*overrides: str) -> Plan:
    composed = compose([*DEMO, *overrides])
    return resolve(composed.recipe, composed.sources)


def test_the_plan_names_the_part_and_needs_data_for_it() -> None:
    plan = planned(PART)
    (part,) = plan.parts
    assert (part.name, part.type, part.parameters) == ("lm_head", "Linear", 2048 * 256)
    assert str(part) == "xnnpack(dynamic=False, per_channel=True)"
    assert "rule part, override +rules.part=" in part.source
    assert "lm_head" not in plan.specs()
    assert "lm_head" not in {row.name for row in plan.untouched}
    assert plan.needs_calibration
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    without = planned()
    (change,) = find_differences(Side("", without), Side("", plan)).points
    assert (change.module, change.before, change.after) == ("lm_head", "-", str(part))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["export=compressed_tensors"], "lm_head: compressed_tensors has no word for what PT2E makes of a module"),
        (["export=circle"], "export=openvino, export=torch_export; or with export=none"),
        (["float_prefix=1"], "PT2E knows no first tokens that stay float"),
        (["calibration.pack=false"], "padding would enter the ranges"),
        (["rules.part.match.name=model.layers.1"], "which is no tensor"),
        (["rules.part.match.name=model.layers.1.mlp", "rules.part.quantizer=embedding"], "finds nothing in it"),
    ],
)
def test_what_is_refused_in_the_plan(overrides: list[str], told: str) -> None:
    with pytest.raises(PlanError) as error:
        planned(PART, *overrides)
    assert told in str(error.value)


def test_a_tied_head_and_streaming_are_refused(tmp_path: Path) -> None:
    model = random_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(PlanError, match=r"lm_head shares a tensor with model.embed_tokens.weight"):
        planned(PART, "model=hf", f"model.path={model}")
    composed = compose([*DEMO, PART, "runtime.load=streaming"])
    with pytest.raises(PlanError, match="streaming: PT2E calibrates lm_head in forwards of the whole model"):
        check_machine(planned(PART), composed.settings, wrapq.calibration.processes.Processes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    result = wrapq.run("w8a8_static", [*DEMO[1:], PART, "tracking=none", f"paths.outputs={outputs}"])
    assert result is not None
    return result.folder


@pytest.mark.slow
@torch.no_grad()
def test_the_part_of_a_run_is_what_pt2e_makes_of_it_by_hand(folder: Path) -> None:
    model, calibration = wrapq.load(folder), planned(PART).recipe.calibration
    source = ModelSource(ModelConfig(path="wrapq://demo", dtype="float32"))
    head, tokens = source.load(torch.device("cpu")).lm_head, make_source(calibration.source, calibration.options)
    samples = build_samples(tokens, source.tokenizer(), 8, 32, calibration.seed)
    inputs: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for ids, _, _ in samples.batches(4, torch.device("cpu")):
        model(input_ids=ids, use_cache=False)
    hook.remove()
    assert [x.shape for x in inputs] == [(4, 32, 256)] * 2
    by_torchao = by_hand(head, inputs)
    for x in (*inputs, torch.randn(4, 32, 256)):
        assert torch.equal(model.lm_head(x), by_torchao(x))


@pytest.mark.slow
@torch.no_grad()
def test_it_loads_elsewhere_without_preparing_anything(folder: Path) -> None:
    model, ids = wrapq.load(folder), torch.arange(1, 9)[None]
    assert isinstance(model.lm_head, GraphProgram)
    script = f"""
import sys, torch, wrapq
from wrapq.runs.checkpoint import tensors_digest
logits = wrapq.load({str(folder)!r})(input_ids=torch.arange(1, 9)[None]).logits
print(tensors_digest({{"logits": logits}}), "torchao.quantization.pt2e.quantize_pt2e" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    digest = wrapq.runs.checkpoint.tensors_digest({"logits": model(input_ids=ids).logits})
    assert done.stdout.split() == [digest, "False"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.slow
def test_it_is_exported_later_to_what_knows_its_operators(folder: Path) -> None:
    formats = ["torch_export", "onnx"]
    options = [f"export.{name}.beside_float=false" for name in formats]
    result = CliRunner().invoke(main, ["export", str(folder), f"export=[{','.join(formats)}]", *options])
    assert result.exit_code == 0, result.output
    assert result.output.count("100.00 % of next tokens the same") == 2
    refused = CliRunner().invoke(main, ["export", str(folder), "export=compressed_tensors"])
    assert "compressed_tensors has no word for what PT2E makes of a module" in refused.output


@pytest.mark.slow
def test_it_is_no_float_model_when_it_is_taken_apart(folder: Path) -> None:
    with pytest.raises(ModelError, match="lm_head is a graph of PT2E's"):
        wrapq.run("w8a16", ["model=hf", f"model.path={folder}", "model.dequantize=true", "tracking=none"])
