"""Presets of a team: shown, refused when names clash, and begun as a package that passes its own test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import wrapq
from wrapq.recipe.compose import compose
from wrapq.recipe.scaffold import new_package

Cli = Callable[..., Result]
ROOT = Path(wrapq.__file__).resolve().parents[1]


def test_show_a_recipe(cli: Cli) -> None:
    result = cli("presets", "show", "recipe=w8a16")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"from wrapq {wrapq.__version__}: {ROOT / 'recipes' / 'w8a16.yaml'}" in result.stdout
    assert (ROOT / "recipes" / "w8a16.yaml").read_text().strip() in result.stdout
    assert "\ncomposes to\n# wrapq run recipe=THIS_FILE" in result.stdout


def test_show_what_is_not_there_or_ambiguous(cli: Cli) -> None:
    assert "say which: recipe=w8a16 or scheme=w8a16" in cli("presets", "show", "w8a16").stderr
    result = cli("presets", "show", "w4a17")
    assert (result.exit_code, "did you mean: w4a16" in result.stderr) == (2, True)


def test_a_clash_names_both_sources(cli: Cli, tmp_path: Path) -> None:
    scheme = tmp_path / "team" / "conf" / "scheme" / "w4a16.yaml"
    scheme.parent.mkdir(parents=True)
    scheme.write_text("# Ours.\nweight: int4:g32:sym\n")
    team = str(tmp_path / "team")
    listed = cli("presets", "--config-dir", team)
    assert listed.exit_code == 0
    assert f"note: scheme=w4a16 cannot be chosen, it is a name in {team} and wrapq" in listed.stderr
    for command in (("plan", "recipe=w4a16_rtn"), ("presets", "show", "scheme=w4a16")):
        result = cli(*command, "--config-dir", team)
        assert result.exit_code == 2
        assert f"{scheme} of {team} and conf/scheme/w4a16.yaml of wrapq {wrapq.__version__}" in result.stderr
    assert cli("plan", "recipe=w8a16", "--config-dir", team).exit_code == 0  # what is not chosen does no harm


def test_a_link_out_of_the_presets_is_no_preset(tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("weight: int6:channel:sym\n")
    folder = tmp_path / "team" / "conf" / "scheme"
    folder.mkdir(parents=True)
    (folder / "w6.yaml").symlink_to(secret)
    with pytest.raises(wrapq.errors.RecipeError, match="unknown scheme 'w6'"):
        compose(["recipe=w4a16_rtn", "scheme=w6"], [tmp_path / "team"])


@pytest.mark.parametrize("name", ["../x", "Acme", "wrapq-x", "a" * 80, "", "a b", "1x", "a/b"])
def test_names_no_package_can_have(name: str, cli: Cli) -> None:
    result = cli("presets", "new", "--", name)
    assert (result.exit_code, list(Path().iterdir())) == (2, [])


@pytest.mark.slow
def test_a_new_package_is_built_installed_and_passes_its_test(tmp_path: Path) -> None:
    new_package("acme_quant", tmp_path)
    site = tmp_path / "site"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
    ]
    run([*install, str(tmp_path / "acme_quant")], tmp_path, ROOT)
    paths = (site, ROOT)
    tested = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "acme_quant")], tmp_path, *paths)
    assert "4 passed" in tested
    shown = run(["-m", "wrapq", "presets", "show", "acme_quant_w6a16"], tmp_path, *paths)
    assert f"from acme-quant 0.1.0: {site / 'acme_quant' / 'recipes' / 'acme_quant_w6a16.yaml'}" in shown
    code = "from wrapq.recipe.compose import compose; from wrapq.resolve.resolve import resolve"
    code += "; c = compose(['recipe=acme_quant_w6a16']); print(resolve(c.recipe, c.sources).presets)"
    assert "package='acme-quant', version='0.1.0'" in run(["-c", code], tmp_path, *paths)


def run(arguments: list[str], folder: Path, *paths: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
