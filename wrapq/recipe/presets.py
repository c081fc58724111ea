"""Where presets lie, and what there is.

A root is a pair of folders: `conf` with the vocabulary (one folder per group) and `recipes` with complete recipes. The
roots are, in the order in which a name is looked up: folders given on the command line, those that ship with wrapq, and
those of installed packages that declare an entry point in the group `wrapq.presets` naming a package with such folders.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from wrapq.errors import Problem, RecipeError, WrapqError
from wrapq.recipe.documents import read_document

ENTRY_POINT_GROUP = "wrapq.presets"
EXPERIMENT_GROUPS = ("model", "scheme", "algorithm", "calibration", "evaluation", "export")
SETTINGS_GROUPS = ("tracking", "runtime", "paths", "sweep", "launcher")
GROUPS = EXPERIMENT_GROUPS + SETTINGS_GROUPS
SUFFIX = ".yaml"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Root:
    """One place that presets come from: its name as shown to the user, and its two folders."""

    name: str
    conf: Path
    recipes: Path


@dataclass(frozen=True)
class Preset:
    """One YAML file a user can choose: `kind` is `recipe` or the name of a conf group."""

    kind: str
    name: str
    description: str
    origin: str
    path: Path


def preset_roots(extra_dirs: Sequence[Path] = ()) -> list[Root]:
    """The roots in the order of look-up; raises `RecipeError` when one of `extra_dirs` is no folder."""
    return [*map(_extra_root, extra_dirs), _shipped_root(), *_installed_roots()]


def list_presets(extra_dirs: Sequence[Path] = ()) -> list[Preset]:
    """Every recipe, then every option of every group, by name; a name that an earlier root holds hides later ones."""
    found: dict[tuple[str, str], Preset] = {}
    for root in preset_roots(extra_dirs):
        for preset in _presets_of(root):
            found.setdefault((preset.kind, preset.name), preset)
    order = {kind: index for index, kind in enumerate(("recipe", *GROUPS))}
    return sorted(found.values(), key=lambda preset: (order[preset.kind], preset.name))


def option_names(folder: Path) -> Iterator[str]:
    """The names of the YAML files under `folder`, such as `demo` and `llama/w4a16`."""
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        yield path.relative_to(folder).with_suffix("").as_posix()


@cache
def _shipped_root() -> Root:
    checkout = _PACKAGE.parent
    base = checkout if (checkout / "conf" / "config.yaml").is_file() else _PACKAGE / "_presets"
    return Root("wrapq", base / "conf", base / "recipes")


def _extra_root(folder: Path) -> Root:
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError([Problem("--config-dir", f"no such folder: {folder}")])
    return _root(str(folder), folder)


def _root(name: str, folder: Path) -> Root:
    conf, recipes = folder / "conf", folder / "recipes"
    if conf.is_dir() or recipes.is_dir():
        return Root(name, conf, recipes)
    return Root(name, folder, folder)


@cache
def _installed_roots() -> tuple[Root, ...]:
    return tuple(
        _root(point.name, Path(folder))
        for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
        for folder in _package_folders(point.module)
    )


def _package_folders(module: str) -> Iterable[str]:
    # found without importing it: listing presets must not run a package's code
    spec = importlib.util.find_spec(module.partition(".")[0])
    base = [Path(location) for location in (spec.submodule_search_locations or ())] if spec else []
    return [str(location.joinpath(*module.split(".")[1:])) for location in base]


def _presets_of(root: Root) -> Iterator[Preset]:
    for group in GROUPS:
        for name in option_names(root.conf / group):
            path = root.conf / group / f"{name}{SUFFIX}"
            yield Preset(group, name, _first_comment(path), root.name, path)
    for name in option_names(root.recipes):
        flat = root.recipes == root.conf
        if not (flat and name.partition("/")[0] in GROUPS):
            path = root.recipes / f"{name}{SUFFIX}"
            yield Preset("recipe", name, _description(path), root.name, path)


def _description(path: Path) -> str:
    try:
        text = read_document(path, path.name).data.get("description")
    except WrapqError:
        return "(cannot be read)"
    return " ".join(str(text or "").split())


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("#") and not line.startswith(("# @", "# yaml-language-server")):
                return line.lstrip("# ").strip()
    return ""
