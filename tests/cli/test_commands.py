"""What each command prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from wrapq.recipe.presets import list_presets
from wrapq.resolve.plan import Plan

Cli = Callable[..., Result]


def test_help_names_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    for command in ("run", "plan", "presets", "schema", "ui", "evaluate"):
        assert f"\n  {command} " in result.stdout
        assert cli(command, "--help").exit_code == 0


def test_unknown_command(cli: Cli) -> None:
    result = cli("rum")
    assert result.exit_code == 2
    assert "No such command 'rum'" in result.stderr


def test_presets_lists_every_one_with_its_description(cli: Cli) -> None:
    result = cli("presets")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"{preset.kind}={preset.name}" for preset in list_presets()]
    assert all(len(line.split()) > 3 for line in lines)


def test_presets_of_a_folder_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "team" / "recipes"
    folder.mkdir(parents=True)
    (folder / "ours.yaml").write_text("# @package _global_\nname: ours\ndescription: What we always do.\n")
    result = cli("presets", "--config-dir", str(tmp_path / "team"))
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("recipe=ours")]
    assert line.split() == ["recipe=ours", "What", "we", "always", "do.", f"[{tmp_path / 'team'}]"]


def test_schema_is_json_and_knows_options_of_algorithms(cli: Cli) -> None:
    result = cli("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["$schema"].startswith("http")
    assert "act_order" in result.stdout


def test_plan_as_json_is_the_plan(cli: Cli) -> None:
    result = cli("plan", "--json", "recipe=w8a8_static")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = Plan.model_validate_json(result.stdout)
    assert plan.recipe.name == "w8a8_static"
    assert len(plan.modules) == 28


def test_plan_folds_blocks_and_full_does_not(cli: Cli) -> None:
    short, full = cli("plan", "recipe=w8a8_static").stdout, cli("plan", "--full", "recipe=w8a8_static").stdout
    assert "model.layers.{0-3}.mlp.down_proj" in short
    assert "model.layers.2.mlp.down_proj" not in short
    assert "model.layers.2.mlp.down_proj" in full
    assert "{0-3}" not in full
    assert not Path("outputs").exists()


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("plan", "--debug", "recipe=nothing")
    assert type(result.exception).__name__ == "RecipeError"


def test_without_debug_there_is_none(cli: Cli) -> None:
    result = cli("plan", "recipe=nothing")
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_a_defect_says_that_it_is_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrapq.recipe.presets.list_presets", lambda dirs: 1 / 0)
    result = cli("presets")
    assert result.exit_code == 70
    assert result.stderr.startswith("error: ZeroDivisionError: division by zero\nThis is a defect of wrapq")


def test_ui_before_any_run(cli: Cli) -> None:
    result = cli("ui")
    assert result.exit_code == 6
    assert "nothing has been recorded yet" in result.stderr


def test_evaluate_the_shipped_model(cli: Cli) -> None:
    result = cli("evaluate", "wrapq://demo", "evaluation.tokens=1024", "evaluation.seq_len=128")
    assert (result.exit_code, result.stderr) == (0, "")
    header, row = [line for line in result.stdout.splitlines() if line.strip()]
    assert header.split()[:1] == ["perplexity"]
    assert row.split()[0] == "wrapq://demo"
    assert 10 < float(row.split()[1]) < 60


def test_evaluate_what_is_no_model(cli: Cli, tmp_path: Path) -> None:
    result = cli("evaluate", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert f"no such folder: {tmp_path / 'nothing'}" in result.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            "recipe=w8a8_",
            {f"recipe=w8a8_{name}" for name in ("dynamic", "pt2e_head", "smoothquant", "static", "static_rotated")},
        ),
        ("scheme", {"scheme="}),
        ("eval", {"evaluation=", "evaluation."}),
    ],
)
def test_tab_completion(typed: str, expected: set[str], tmp_path: Path) -> None:
    words = {"COMP_WORDS": f"wrapq run {typed}", "COMP_CWORD": "2", "_WRAPQ_COMPLETE": "bash_complete"}
    command = [str(Path(sys.executable).parent / "wrapq")]
    result = subprocess.run(command, env=os.environ | words, cwd=tmp_path, capture_output=True, text=True)
    assert {line.partition(",")[2] for line in result.stdout.splitlines()} == expected


def test_a_run_prints_one_table_and_where_everything_lies(cli: Cli) -> None:
    options = ("evaluation.tokens=1024", "evaluation.seq_len=128", "calibration.samples=4", "tracking=none")
    result = cli("run", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    (folder,) = Path("outputs/demo").iterdir()
    lines = result.stdout.splitlines()
    assert lines[0] == "demo on wrapq://demo: 28 modules to quantize, 27 left in float"
    assert lines[1].split() == ["perplexity", "change", "KL", "to", "float", "top-1", "agreement", "size"]
    assert [line[:17].strip() for line in lines[2:5]] == ["float", "weights quantized", "all quantized"]
    assert f"model and record: {folder}" in lines
    assert lines[-1] == f'load it: wrapq.load("{folder}")'
