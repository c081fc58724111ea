"""The wheel holds all that a run needs, and runs where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("evaluation.tokens=4096", "calibration.samples=8", "runtime.device=cpu")


def call(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with nothing in the environment that could point back to the checkout."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "WRAPQ", "VIRTUAL_ENV"))
    }
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it: what is missing in the one is missing in the other."""
    out = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment with the wheel in it.

    The dependencies are those of the environment that runs the tests, seen through a `.pth` file, which adds a folder
    at the end of the path and, unlike a second environment, runs none of the `.pth` files in it: neither the checkout
    nor another installed wrapq comes before the wheel.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    scheme = sysconfig.get_preferred_scheme("prefix")
    paths = sysconfig.get_paths(scheme, vars={"base": str(folder), "platbase": str(folder)})
    python = Path(paths["scripts"], "python")
    call([str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(built[1])], folder)
    libraries = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(paths["purelib"], "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return python.parent


def relative(paths: list[Path]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_wheel_holds_presets_and_assets(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    presets = relative([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("recipes/**/*.yaml")])
    package = relative([p for p in ROOT.glob("wrapq/**/*") if p.is_file() and "__pycache__" not in p.parts])
    assert len(presets) > 10
    assert {f"wrapq/_presets/{name}" for name in presets} <= names
    assert package <= names
    assert {name.split("/")[0] for name in names} == {"wrapq", f"wrapq-{_version(built[1])}.dist-info"}
    assert built[1].stat().st_size < 20e6


def test_sdist_holds_the_tests_and_what_they_read(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "recipes/demo.yaml", "tests/packaging/test_wheel.py"} <= names
    assert not [name for name in names if name.startswith("outputs/")]


def test_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        prefix = f"wrapq-{_version(built[1])}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{prefix}/METADATA").decode())
        scripts = wheel.read(f"{prefix}/entry_points.txt").decode()
        assert f"{prefix}/licenses/LICENSE" in wheel.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert scripts.split() == ["[console_scripts]", "wrapq", "=", "wrapq.cli:main"]
    assert any(line.replace(" ", "") == "torch<2.14,>=2.9" for line in metadata.get_all("Requires-Dist"))


@pytest.mark.slow
def test_the_wheel_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    code = "import wrapq, wrapq.recipe.presets as p; print(wrapq.__file__); print(*p.preset_roots(), sep='\\n')"
    result = call([str(installed / "python"), "-c", code], tmp_path)
    assert str(ROOT) not in result.stdout
    assert all(str(installed.parent) in line for line in result.stdout.splitlines())


@pytest.mark.slow
def test_the_default_recipe_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    result = call([str(installed / "wrapq"), "run", *SMALL], tmp_path, COLUMNS="120")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (folder,) = (tmp_path / "outputs" / "demo").iterdir()
    for name in ("recipe.yaml", "plan.json", "recipe.lock.yaml", "model.safetensors", "manifest.json", "log.txt"):
        assert (folder / name).stat().st_size, name
    assert (tmp_path / "outputs" / "mlflow.db").is_file()
    for word in ("perplexity", "float", "weights quantized", "all quantized", f"outputs/demo/{folder.name}"):
        assert word in result.stdout
    loading = f"import wrapq; model = wrapq.load({str(folder)!r}); print(type(model).__name__)"
    assert call([str(installed / "python"), "-c", loading], tmp_path).stdout.strip() == "LlamaForCausalLM"


@pytest.mark.slow
def test_presets_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    listed = call([str(installed / "python"), "-m", "wrapq", "presets"], tmp_path).stdout
    assert {f"recipe={path.stem}" for path in ROOT.glob("recipes/*.yaml")} <= set(listed.split())


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]
