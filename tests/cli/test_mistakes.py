"""Every mistake of a user gets one message that names the place, before weights are read or anything is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from wrapq.errors import alike
from wrapq.recipe.presets import list_presets
from wrapq.recipe.spec_patch import SpecFields

OUTPUTS = "paths.outputs=out"

IN_THE_RECIPE = {
    "a key no spec has": (
        ["rules.linear.weight.weight_bit=4"],
        """\
error: 1 mistake in the recipe:
  - override rules.linear.weight.weight_bit=4: rules.linear.weight.weight_bit: unknown key 'weight_bit'
    did you mean: dtype
    the keys of a spec are: {keys}
""",
    ),
    "a scheme that does not exist": (
        ["scheme@rules.linear=w4a17"],
        """\
error: 1 mistake in the recipe:
  - override scheme@rules.linear=w4a17: unknown scheme 'w4a17'
    did you mean: {schemes}
""",
    ),
    "the same in its short form": (
        ["scheme=w4a17"],
        """\
error: 1 mistake in the recipe:
  - override scheme=w4a17: unknown scheme 'w4a17'
    did you mean: {schemes}
""",
    ),
    "an option misspelt": (
        ["recipe=w4a16_gptq", "stack.round.actorder=true"],
        """\
error: 1 mistake in the recipe:
  - override stack.round.actorder=true: stack.round.actorder: gptq has no option 'actorder'
    did you mean: act_order
""",
    ),
    "an option of another algorithm": (
        ["stack.round.act_order=true"],
        """\
error: 1 mistake in the recipe:
  - override stack.round.act_order=true: stack.round.act_order: rtn has no option 'act_order'
    did you mean: algorithm, rules
""",
    ),
    "an algorithm that does not exist": (
        ["stack.round.algorithm=gtpq"],
        """\
error: 1 mistake in the recipe:
  - override stack.round.algorithm=gtpq: stack.round.algorithm: unknown algorithm 'gtpq'
    did you mean: gptq
""",
    ),
    "a data file that does not exist": (
        ["calibration=text", "calibration.path=data/clib.txt"],
        """\
error: 1 mistake in the recipe:
  - override calibration.path=data/clib.txt: calibration.path: data file 'data/clib.txt' does not exist; \
in 'data' there is: calib.txt
""",
    ),
    "calibration text that is empty": (
        ["calibration=text", "calibration.path=data/empty.txt"],
        """\
error: 1 mistake in the recipe:
  - override calibration.path=data/empty.txt: calibration.path: data file 'data/empty.txt' is empty
""",
    ),
    "a key that nothing reads, at the top": (
        ["modle.path=x"],
        """\
error: 1 mistake in the recipe:
  - override modle.path=x: modle: unknown key 'modle'
    did you mean: model
""",
    ),
    "a key that nothing reads, of a data source": (
        ["calibration.sampels=3"],
        """\
error: 1 mistake in the recipe:
  - override calibration.sampels=3: calibration.sampels: source demo has no option 'sampels'
    did you mean: samples, split
""",
    ),
    "several at once": (
        ["rules.linear.weight.weight_bit=4", "modle.path=x"],
        """\
error: 2 mistakes in the recipe:
  - override rules.linear.weight.weight_bit=4: rules.linear.weight.weight_bit: unknown key 'weight_bit'
    did you mean: dtype
    the keys of a spec are: {keys}
  - override modle.path=x: modle: unknown key 'modle'
    did you mean: model
""",
    ),
}

IN_THE_PLAN = {
    "an override of a module that does not exist": (
        ["+rules.down.match.name=*.mlp.dwon_proj", "+rules.down.weight=int8:channel"],
        """\
error: 1 problem in the plan:
  - override +rules.down.match.name=*.mlp.dwon_proj: rules.down.match: name '*.mlp.dwon_proj' matches no module
    did you mean: *.mlp.down_proj, *.mlp.up_proj, *.mlp.gate_proj
    correct it, or set optional: true in the rule
""",
    ),
    "a layer that does not exist": (
        ["+rules.late.match.layers=77", "+rules.late.weight=int8:channel"],
        """\
error: 1 problem in the plan:
  - override +rules.late.match.layers=77: rules.late.match: layers 77 is outside the model's 6 blocks (0 to 5)
    correct it, or set optional: true in the rule
""",
    ),
    "a group size that does not divide": (
        ["recipe=w4a16_rtn", "rules.linear.weight.group_size=100"],
        """\
error: 2 problems in the plan:
  - rule linear, conf/scheme/w4a16.yaml:2 + rule linear, override rules.linear.weight.group_size=100: \
model.layers.0.self_attn.q_proj.weight and 35 more: int4:g100:sym: group size 100 does not divide the width 256 \
(56 left over); 256 is divided by 128, 64, 32, 16
  - rule linear, conf/scheme/w4a16.yaml:2 + rule linear, override rules.linear.weight.group_size=100: \
model.layers.0.mlp.down_proj.weight and 5 more: int4:g100:sym: group size 100 does not divide the width 512 \
(12 left over); 512 is divided by 128, 64, 32, 16
""",
    ),
    "a key that nothing reads, of calibration": (
        ["recipe=w8a16", "calibration.samples=5"],
        """\
error: 1 problem in the plan:
  - override calibration.samples=5: calibration.samples: nothing reads it: no stage of this recipe looks at \
calibration data
    leave it out
""",
    ),
    "rules that quantize nothing": (
        ["recipe=w8a16", "~rules.head", "rules.linear.quantize=false", "~stack.round"],
        """\
error: 1 problem in the plan:
  - rules: no rule quantizes anything in this model: the run would change nothing
    wrapq evaluate measures a model as it is
""",
    ),
}


@pytest.fixture(autouse=True)
def data(cli: Callable[..., Result]) -> None:
    folder = Path("data")
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "calib.txt").write_text("text\n")


PLANNED = ("several at once", "a data file that does not exist", "a layer that does not exist")
"""Of these `plan` is asked too in the plain tests; what it says of the others is slow."""
PAIRS = [
    pytest.param(mistake, command, marks=() if command == "run" or mistake in PLANNED else pytest.mark.slow)
    for mistake in (*IN_THE_RECIPE, *IN_THE_PLAN)
    for command in ("run", "plan")
]


@pytest.mark.parametrize(("mistake", "command"), PAIRS)
def test_names_the_place(mistake: str, command: str, cli: Callable[..., Result], weightless: Path) -> None:
    overrides, message = (IN_THE_RECIPE | IN_THE_PLAN)[mistake]
    # there will be more schemes and keys: the message lists those there are
    schemes = [preset.name for preset in list_presets() if preset.kind == "scheme"]
    message = message.replace("{schemes}", ", ".join(alike("w4a17", schemes)))
    message = message.replace("{keys}", ", ".join(SpecFields.model_fields))
    result = cli(command, "model=hf", f"model.path={weightless}", OUTPUTS, *overrides)
    assert (result.stderr, result.exit_code) == (message, 2)
    assert not Path("out").exists()


def test_model_path_that_does_not_exist(cli: Callable[..., Result], weightless: Path) -> None:
    missing = weightless.parent / "weigthless"
    result = cli("run", "model=hf", f"model.path={missing}", OUTPUTS)
    message = f"""\
error: 1 problem in the plan:
  - override model.path={missing}: model.path: no such folder: {missing}
    did you mean: {weightless}
    give a folder with config.json and weights, or a hub name
"""
    assert (result.stderr, result.exit_code) == (message, 2)
    assert not Path("out").exists()


def test_a_model_folder_that_holds_no_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("run", "model=hf", f"model.path={tmp_path}", OUTPUTS)
    message = f"""\
error: 1 problem in the plan:
  - override model.path={tmp_path}: model.path: {tmp_path} holds no config.json, so it is no language model
    wrapq run takes these alone; from Python wrapq.quantize(module, recipe, batches) takes any module
"""
    assert (result.stderr, result.exit_code) == (message, 2)
    assert not Path("out").exists()


def test_without_a_mistake_the_missing_weights_are_what_fails(cli: Callable[..., Result], weightless: Path) -> None:
    """So the tests above would see it if weights were read first."""
    result = cli("run", "model=hf", f"model.path={weightless}", OUTPUTS, "tracking=none")
    assert result.exit_code == 4
    assert result.stderr.startswith(f"error: model.path {weightless}: cannot read the weights: ")
    assert [path.name for path in Path("out/demo").glob("*/run.json")] == ["run.json"]


@pytest.mark.slow
def test_the_installed_command_says_the_same(weightless: Path, tmp_path: Path) -> None:
    overrides, message = IN_THE_RECIPE["an algorithm that does not exist"]
    command = [sys.executable, "-m", "wrapq", "run", f"model.path={weightless}", OUTPUTS, *overrides]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.stderr, result.stdout, result.returncode) == (message, "", 2)
    assert not (tmp_path / "out").exists()
