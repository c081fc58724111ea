"""compare and diff: what they show, what they say to programs, and with which status they end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from wrapq.cli import main

Cli = Callable[..., Result]
SMALL = ("evaluation.tokens=512", "evaluation.seq_len=64", "tracking=none", "runtime.kernels=reference")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("w8a16", "w4a16_rtn"):
        result = CliRunner().invoke(main, ["run", f"recipe={name}", *SMALL, f"paths.outputs={folder}"])
        assert result.exit_code == 0, result.stderr
    return folder


def test_runs_side_by_side_with_the_best_marked(cli: Cli, outputs: Path) -> None:
    result = cli("compare", "w8a16", "w4a16_rtn", f"paths.outputs={outputs}")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["kl"][1] == "*" and rows["size_mb"][-1] == "*"
    assert rows["bits_per_weight"] == ["8.25", "4.25", "*"]
    assert "model.layers.{0-3}.mlp.down_proj.weight" in rows
    assert {"0", "1", "2", "3"} <= set(rows)  # the error after each block


def test_comparison_for_programs(cli: Cli, outputs: Path) -> None:
    folders = [str(next((outputs / name).iterdir())) for name in ("w8a16", "w4a16_rtn")]
    said = json.loads(cli("compare", "--json", *folders).stdout)
    assert said["best"]["kl"] == [folders[0]] and said["best"]["size_mb"] == [folders[1]]
    assert [len(run["curves"]["layer/relative_error"]) for run in said["runs"]] == [4, 4]
    assert len(said["runs"][0]["weights"]) == 28


def test_quality_on_other_text_has_no_best(cli: Cli, outputs: Path, tmp_path: Path) -> None:
    folder = next((outputs / "w8a16").iterdir())
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    lock = (other / "recipe.lock.yaml").read_text()
    start = lock.index("  evaluation: ", lock.index("digests:"))
    (other / "recipe.lock.yaml").write_text(
        lock[:start] + "  evaluation: other" + lock[start + len("  evaluation: ") + 64 :]
    )
    result = cli("compare", str(folder), str(other), str(next((outputs / "w4a16_rtn").iterdir())))
    assert "measured on different models or texts" in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("kl ")]
    assert "*" not in row


def test_what_is_no_run(cli: Cli, outputs: Path) -> None:
    result = cli("compare", "w8a16", "w4a61_rtn", f"paths.outputs={outputs}")
    assert result.exit_code == 4
    assert "did you mean: w4a16_rtn" in result.stderr


def test_equal_recipes_differ_in_nothing(cli: Cli) -> None:
    result = cli("diff", "w4a16_rtn", "w4a16_rtn description='other words' rules.linear.weight.group_size=128")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("do the same\n")


def test_recipes_differ_by_module_stage_and_setting(cli: Cli) -> None:
    last = "'+rules.last={match: {layers: -1, type: Linear}, weight: \"int8:channel:sym\"}'"
    result = cli("diff", "--json", "w4a16_gptq", f"w4a16_gptq stack.round.damp=0.05 seed=3 {last}")
    assert (result.exit_code, result.stderr) == (1, "")
    said = json.loads(result.stdout)
    assert {(p["point"], p["before"], p["after"]) for p in said["points"]} == {
        ("weight", "int4:g128:sym:signed", "int8:channel:sym")
    }
    assert {p["module"].split(".")[2] for p in said["points"]} == {"3"} and len(said["points"]) == 7
    assert [(c["what"], c["before"], c["after"]) for c in said["stages"]] == [("round.damp", "0.01", "0.05")]
    assert [(c["what"], c["after"]) for c in said["settings"]] == [("seed", "3")]


def test_differences_are_folded_over_blocks(cli: Cli) -> None:
    result = cli("diff", "w4a16_rtn", "w8a8_static")
    assert result.exit_code == 1
    assert "model.layers.{0-3}.mlp.down_proj" in result.stdout and "model.layers.2" not in result.stdout
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("calibration ")]
    assert row.split("  ")[0] == "calibration" and "tokens of demo" in row


def test_a_run_its_plan_and_its_lock_are_the_same(cli: Cli, outputs: Path) -> None:
    folder = next((outputs / "w8a16").iterdir())
    assert cli("diff", str(folder), str(folder / "plan.json")).exit_code == 0
    assert cli("diff", str(folder / "recipe.lock.yaml"), str(folder)).exit_code == 0
    result = cli("diff", str(folder), "w8a16")
    assert (result.exit_code, "evaluation.tokens" in result.stdout) == (1, True)


def test_what_cannot_be_said_is_neither(cli: Cli) -> None:
    for sides in (("w8a16", "w8a61"), ("w8a16", "w8a16 'x"), ("nowhere/plan.json", "w8a16")):
        result = cli("diff", *sides)
        assert result.exit_code == 2, sides
        assert "defect" not in result.stderr
