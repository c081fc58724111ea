"""Traps found by hand in other quantizers (TICO, llm-compressor): each shown not to be one of ours.

Tests of the parts go deeper; these are named after the trap, so that its absence stays on record.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

import wrapq
from tests.conftest import build_model
from tests.models import damaged, random_model, without_weights
from wrapq import PTQConfig, convert, prepare
from wrapq.errors import CalibrationError, LifecycleError, PlanError, RecipeError, SpecError, WrapqError
from wrapq.quant.spec import QuantSpec
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.wrappers.model import iter_wrapped

SMALL = ("evaluation.tokens=512", "calibration.samples=4", "tracking=none", "runtime.kernels=reference")
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def plan(*overrides: str) -> Plan:
    composed = compose(overrides)
    return resolve(composed.recipe, composed.sources)


def refused(*overrides: str) -> str:
    with pytest.raises(WrapqError) as caught:
        plan(*overrides)
    return str(caught.value)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# --- recipes


@pytest.mark.parametrize(
    "typo",
    [
        "rules.linear.weight.weight_bit=4",
        "rules.linear.weight.gruop_size=32",
        "rules.linear.weight.observer_kwargs={}",
        "rules.linear.actvation=int8:tensor",
        "+rules.linear.mtch={}",
        "modle.family=llama",
        "stack.round.actorder=true",
        "stak={}",
        "calibration.sampels=3",
    ],
)
def test_typos_are_not_accepted(typo: str) -> None:
    assert typo.split("=")[0].lstrip("+").split(".")[-1] in refused(typo)


def test_observer_options_are_checked() -> None:
    said = refused("recipe=w8a16", "rules.linear.weight.observer={name: mse, maxshirnk: 0.5}")
    assert "observer mse has no option 'maxshirnk'" in said


def test_impossible_bit_widths_are_refused_with_the_names_there_are() -> None:
    assert "w4" in refused("rules.linear.weight=w4")
    assert "int17" in refused("rules.linear.weight=int17:channel")


@pytest.mark.parametrize("override", ["name: '*.mlp.dwon_proj'", "layers: 77", "name: model.layers.77.mlp.up_proj"])
def test_overrides_of_nothing_are_refused(override: str) -> None:
    said = refused(f"+rules.x={{match: {{{override}}}, weight: int8:channel}}")
    assert "rules.x.match" in said


def test_overrides_of_nothing_are_refused_in_the_python_api() -> None:
    with pytest.raises(PlanError, match="dwon_proj"):
        prepare(build_model("llama"), PTQConfig(overrides={"*.mlp.dwon_proj": {"weight": "int4:channel"}}))


def test_an_ignore_that_matches_nothing_is_refused() -> None:
    assert "'lm_haed' matches no module" in refused("+rules.x={match: {name: lm_haed}, quantize: false}")


def test_a_bare_name_means_the_module_without_a_prefix() -> None:
    """`ignore: [q_proj]` without `re:` was silently nothing."""
    made = plan("recipe=w8a16", "+rules.x={match: {name: q_proj}, quantize: false}")
    assert not [module.name for module in made.modules if module.name.endswith("q_proj")]


def test_overlapping_rules_follow_their_order_not_the_alphabet() -> None:
    narrow = "{match: {name: 're:model.layers.0.*', type: Linear}, weight: int4:channel}"
    wide = "{match: {name: 're:.*_proj'}, weight: int8:channel}"
    for first, second, spec in (("a", "z", "int4:channel:sym"), ("z", "a", "int4:channel:sym")):
        specs = plan("recipe=w8a16", f"+rules.{first}={wide}", f"+rules.{second}={narrow}").specs()
        assert str(specs["model.layers.0.mlp.up_proj"]["weight"]) == spec
        assert str(specs["model.layers.1.mlp.up_proj"]["weight"]) == "int8:channel:sym"


def test_a_recipe_that_quantizes_nothing_is_no_success() -> None:
    assert "the run would change nothing" in refused("recipe=w8a16", "~stack.round", "rules.linear.quantize=false")


def test_a_shape_of_the_recipe_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    """A stage given as a list, a stage without its algorithm, an empty body."""
    for body in ("stack: [{algorithm: rtn}]", "stack: {round: {}}", "stack: {round: }", "algorithms: {round: rtn}"):
        (tmp_path / "mine.yaml").write_text(f"# @package _global_\nname: mine\n{body}\n")
        with pytest.raises(RecipeError):
            compose([f"recipe={tmp_path / 'mine.yaml'}"])


def test_unknown_names_come_with_suggestions() -> None:
    assert "did you mean: gptq" in refused("stack.round.algorithm=gtpq")
    assert "did you mean: w4a16" in refused("scheme@rules.linear=w4a61")
    assert "did you mean: minmax" in refused("rules.linear.input.observer=minmx")


def test_a_bad_dtype_is_found_before_the_model_is_opened(tmp_path: Path) -> None:
    model = f"model.path={without_weights(tmp_path / 'weightless')}"
    assert "int3x" in refused(model, "rules.linear.weight.dtype=int3x")


def test_a_group_size_that_does_not_divide_is_found_in_the_plan() -> None:
    assert "group size 100 does not divide the width 256" in refused(
        "recipe=w4a16_rtn", "rules.linear.weight.group_size=100"
    )


def test_saved_recipes_read_back(tmp_path: Path) -> None:
    result = wrapq.run("w8a16", ["evaluation.tokens=512", "tracking=none", f"paths.outputs={tmp_path}"])
    again = compose([f"recipe={result.folder / 'recipe.yaml'}"]).recipe
    assert again == compose(["recipe=w8a16", "evaluation.tokens=512"]).recipe
    yaml.safe_load((result.folder / "recipe.lock.yaml").read_text())


def test_secrets_are_not_in_saved_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    result = wrapq.run("w8a16", ["evaluation.tokens=512", "tracking=none", f"paths.outputs={tmp_path}"])
    assert not [path for path in result.folder.iterdir() if b"hf_xxx" in path.read_bytes()]
    assert "hf_token" in refused("+model.hf_token=abc")


# --- grids


def test_signed_four_bit_weights_are_not_silently_per_tensor() -> None:
    """The granularity is what the spec says, whatever the sign."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 64)[:, None]
    from wrapq.observers.base import observe_tensor

    errors = {}
    for text in ("int4:channel", "uint4:channel:asym", "int4:tensor"):
        rounded = observe_tensor(weight, QuantSpec.parse(text), "w").fake_quantize(weight)
        errors[text] = float((rounded - weight).norm() / weight.norm())
    assert errors["int4:channel"] < 1.2 * errors["uint4:channel:asym"] < errors["int4:tensor"]


def test_symmetric_unsigned_means_something_or_is_refused() -> None:
    from wrapq.observers.base import observe_tensor

    x = torch.linspace(-1, 1, 256)[None]
    assert (observe_tensor(x, QuantSpec.parse("uint8:tensor:sym"), "x").fake_quantize(x) - x).abs().max() < 0.01


# --- models


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3", "gpt2", "opt", "gemma2", "phi3"])
def test_other_families_are_not_silent_no_ops(family: str, tmp_path: Path) -> None:
    path = random_model(family, tmp_path / family, tie_word_embeddings=False)
    made = plan("recipe=w8a8_static", "model=hf", f"model.path={path}")
    linear = [module for module in made.modules if module.type in ("Linear", "Conv1D")]
    assert len(linear) >= 2 * 4
    assert "lm_head" not in [module.name for module in made.modules]
    assert made.model.block_count == 2


def test_a_module_without_a_wrapper_is_listed_and_strict_names_it() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), Odd())
    with pytest.raises(PlanError, match=r"1 \(Odd\)"):
        prepare(net, PTQConfig(strict=True))


def test_a_failed_prepare_leaves_the_model_as_it_was() -> None:
    model = build_model("llama")
    before, modules = logits(model), [id(module) for module in model.modules()]
    with pytest.raises(WrapqError):
        prepare(model, PTQConfig(overrides={"*.down_proj": {"weight": "int4:g100"}}))
    assert next(iter_wrapped(model), None) is None
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), before)


def test_preparing_twice_is_refused() -> None:
    model = prepare(build_model("llama"))
    with pytest.raises(LifecycleError):
        prepare(model)


def test_converting_without_data_is_refused_by_name() -> None:
    model = prepare(build_model("llama"))
    with pytest.raises(LifecycleError, match=r"\n  model\.layers\.0\.self_attn\.q_proj\.input \(.*\) saw no data"):
        convert(model)


def test_weights_are_not_observed_over_and_over() -> None:
    """Weight ranges were taken ten times per module; here once, at conversion."""
    from wrapq.observers import minmax

    calls: list[torch.Size] = []
    update = minmax.MinMax.update
    model = prepare(build_model("llama"), PTQConfig(activation=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minmax.MinMax, "update", lambda self, x: (calls.append(x.shape), update(self, x))[1])
        logits(model)
        assert not calls
        convert(model)
    assert len(calls) <= sum(1 for _ in build_model("llama").named_parameters())


def test_group_scales_all_survive_conversion_and_saving(tmp_path: Path) -> None:
    """Of a GPTQ result with groups only the last group's scale was kept."""
    result = wrapq.run("w4a16_gptq", [*SMALL, "rules.linear.weight.group_size=32", f"paths.outputs={tmp_path}"])
    model = wrapq.load(result.folder)
    scale = model.get_submodule("model.layers.0.mlp.down_proj").state_dict()["weight_scale"]
    assert scale.shape == (256, 512 // 32)
    assert scale.unique().numel() > 256


def test_state_survives_saving(tmp_path: Path) -> None:
    """`All keys matched`, and outputs that differed by 4 %."""
    result = wrapq.run("demo", [*SMALL, f"paths.outputs={tmp_path}"])
    first, second = wrapq.load(result.folder), wrapq.load(result.folder)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(logits(first), logits(second))


def test_weights_that_are_missing_are_not_random(tmp_path: Path) -> None:
    """Without `quantization_status` a compressed model loaded with random weights and no exception."""
    first = wrapq.run("w8a16", ["evaluation.tokens=512", "tracking=none", f"paths.outputs={tmp_path}"])
    with pytest.raises(WrapqError, match="is quantized already: a run of wrapq"):
        wrapq.run("w8a16", ["evaluation.tokens=512", f"model.path={first.folder}", "tracking=none",
                            f"paths.outputs={tmp_path}"])  # fmt: skip


def test_half_precision_models_quantize() -> None:
    model = prepare(build_model("llama").to(torch.bfloat16))
    logits(model)
    assert logits(convert(model)).dtype == torch.bfloat16


def test_nothing_is_kept_per_layer_that_grows_with_the_context() -> None:
    """A mask of context x context was registered in every layer."""
    model = build_model("llama", max_position_embeddings=8192)
    before = sum(buffer.numel() for buffer in model.buffers())
    model = prepare(model, PTQConfig(activations="int8:tensor:asym"))
    logits(model)
    assert sum(buffer.numel() for buffer in model.buffers()) - before < 10_000


# --- data


def test_nan_in_the_data_names_the_point(tmp_path: Path) -> None:
    model = damaged(tmp_path / "model", "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(CalibrationError, match=r"^model\.layers\.2\.mlp\.up_proj\.weight: the data holds NaN"):
        wrapq.run("w8a8_static", [*SMALL, f"model.path={model}", f"paths.outputs={tmp_path / 'out'}"])


def test_no_data_is_an_error_with_a_name() -> None:
    assert "no stage decides 28 static activations" in refused("recipe=w8a8_static", "~stack.ranges")
    assert "calibration.path has no value" in refused("calibration=text")


def test_shuffling_does_not_depend_on_the_global_random_state(tmp_path: Path) -> None:
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        result = wrapq.run("w8a8_static", [*SMALL, f"paths.outputs={tmp_path}"])
        digests.append({key: result.digests[key] for key in ("calibration", "qparams", "outputs")})
    assert digests[0] == digests[1]


def test_a_failed_run_does_not_disturb_the_next_one(tmp_path: Path) -> None:
    """A process-wide session warned about the dead run."""
    clean = wrapq.run("w8a8_static", [*SMALL, f"paths.outputs={tmp_path / 'a'}"])
    with pytest.raises(WrapqError):
        wrapq.run("w8a8_static", [*SMALL, f"model.path={without_weights(tmp_path / 'm')}", f"paths.outputs={tmp_path}"])
    assert wrapq.run("w8a8_static", [*SMALL, f"paths.outputs={tmp_path / 'b'}"]).digests == clean.digests


def test_specs_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(SpecError):
        QuantSpec.parse("int8:token")
