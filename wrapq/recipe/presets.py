"""Where presets lie, and what there is.

A root is a pair of folders: `conf` with the vocabulary (one folder per group) and `recipes` with complete recipes. The
roots are: folders given on the command line, those that ship with wrapq, and those of installed packages that declare
an entry point in the group `wrapq.presets` naming a package with such folders. A name that several roots hold means
nothing: choosing it is an error that names them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import wrapq
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
    """One place that presets come from.

    Attributes:
        name: as shown to the user: a distribution, or the path of a folder.
        version: of the distribution; empty for a folder.
        conf: the folder of the vocabulary.
        recipes: the folder of recipes.
    """

    name: str
    version: str
    conf: Path
    recipes: Path

    @property
    def package(self) -> str:
        """The name without what only this machine knows."""
        return self.name if self.version else Path(self.name).name


@dataclass(frozen=True)
class Preset:
    """One YAML file a user can choose: `kind` is `recipe` or the name of a conf group."""

    kind: str
    name: str
    description: str
    origin: str
    path: Path
    version: str = ""


def preset_roots(extra_dirs: Sequence[Path] = ()) -> list[Root]:
    """The roots, those named here first; raises `RecipeError` when one of `extra_dirs` is no folder."""
    return [*map(_extra_root, extra_dirs), _shipped_root(), *_installed_roots()]


def list_presets(extra_dirs: Sequence[Path] = ()) -> list[Preset]:
    """Every recipe, then every option of every group, by name; a name that several roots hold stands there for each."""
    found = {preset.path.resolve(): preset for root in preset_roots(extra_dirs) for preset in _presets_of(root)}
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
    return Root("wrapq", wrapq.__version__, base / "conf", base / "recipes")


def _extra_root(folder: Path) -> Root:
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError([Problem("--config-dir", f"no such folder: {folder}")])
    return _root(str(folder), "", folder)


def _root(name: str, version: str, folder: Path) -> Root:
    conf, recipes = folder / "conf", folder / "recipes"
    if conf.is_dir() or recipes.is_dir():
        return Root(name, version, conf, recipes)
    return Root(name, version, folder, folder)


@cache
def _installed_roots() -> tuple[Root, ...]:
    return tuple(
        _root(*((point.dist.name, point.dist.version) if point.dist else (point.name, "?")), Path(folder))
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
            yield Preset(group, name, _first_comment(path), root.name, path, root.version)
    for name in option_names(root.recipes):
        flat = root.recipes == root.conf
        if not (flat and name.partition("/")[0] in GROUPS):
            path = root.recipes / f"{name}{SUFFIX}"
            yield Preset("recipe", name, _description(path), root.name, path, root.version)


def _description(path: Path) -> str:
    try:
        text = read_document(path, path.name).data.get("description")
    except WrapqError:
        return "(cannot be read)"
    return " ".join(str(text or "").split())


def _first_comment(path: Path) -> str:
    try:
        text = read_document(path, path.name).text
    except WrapqError:
        return "(cannot be read)"
    for line in text.splitlines():
        if line.startswith("#") and not line.startswith(("# @", "# yaml-language-server")):
            return line.lstrip("# ").strip()
    return ""
