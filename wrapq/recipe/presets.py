"""Where presets lie, and what there is.

A root is a pair of folders: `conf` with the vocabulary (one folder per group) and `recipes` with complete recipes. The
roots are: folders given on the command line, those that ship with wrapq, and those of installed packages that declare
an entry point in the group `wrapq.presets` naming a package with such folders. A name that several roots hold means
nothing: choosing it is an error that names them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from wrapq.errors import Problem, RecipeError, WrapqError
from wrapq.paths import expand
from wrapq.recipe.yaml_reader import read_document
from wrapq.version import __version__

ENTRY_POINT_GROUP = "wrapq.presets"
EXPERIMENT_GROUPS = ("model", "scheme", "algorithm", "calibration", "evaluation", "export")
SETTINGS_GROUPS = ("tracking", "runtime", "paths", "sweep", "launcher")
GROUPS = EXPERIMENT_GROUPS + SETTINGS_GROUPS
SEVERAL = ("export",)
"""The groups of which several presets may be chosen: `export=[onnx,openvino]`."""
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
    folders = [expand(folder).resolve() for folder in extra_dirs]
    for folder in folders:
        if not folder.is_dir():
            raise RecipeError([Problem("--config-dir", "", f"no such folder: {folder}")])
    return [*(_root(str(folder), "", folder) for folder in folders), *_packaged_roots()]


def list_presets(extra_dirs: Sequence[Path] = ()) -> list[Preset]:
    """Every recipe, then every option of every group, by name; a name that several roots hold stands there for each."""
    found = {preset.path.resolve(): preset for root in preset_roots(extra_dirs) for preset in _presets_of(root)}
    order = {kind: index for index, kind in enumerate(("recipe", *GROUPS))}
    return sorted(found.values(), key=lambda preset: (order[preset.kind], preset.name))


def option_names(folder: Path) -> Iterator[str]:
    """The names of the YAML files under `folder`, such as `demo` and `llama/w4a16`."""
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        yield path.relative_to(folder).with_suffix("").as_posix()


def _root(name: str, version: str, folder: Path) -> Root:
    conf, recipes = folder / "conf", folder / "recipes"
    if conf.is_dir() or recipes.is_dir():
        return Root(name, version, conf, recipes)
    return Root(name, version, folder, folder)


@cache
def _packaged_roots() -> tuple[Root, ...]:
    """What ships with wrapq, then what other packages declare."""
    checkout = _PACKAGE.parent
    base = checkout if (checkout / "conf" / "config.yaml").is_file() else _PACKAGE / "_presets"
    roots = [Root("wrapq", __version__, base / "conf", base / "recipes")]
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        name, version = (point.dist.name, point.dist.version) if point.dist else (point.name, "?")
        # found without importing it: listing presets must not run a package's code
        spec = importlib.util.find_spec(point.module.partition(".")[0])
        for location in (spec.submodule_search_locations or ()) if spec else ():
            roots.append(_root(name, version, Path(location).joinpath(*point.module.split(".")[1:])))
    return tuple(roots)


def _presets_of(root: Root) -> Iterator[Preset]:
    flat = root.recipes == root.conf
    files = [(group, name, root.conf / group) for group in GROUPS for name in option_names(root.conf / group)]
    recipes = (name for name in option_names(root.recipes) if not (flat and name.partition("/")[0] in GROUPS))
    for kind, name, folder in [*files, *(("recipe", name, root.recipes) for name in recipes)]:
        path = folder / f"{name}{SUFFIX}"
        yield Preset(kind, name, _summary(path, kind), root.name, path, root.version)


def _summary(path: Path, kind: str) -> str:
    """The description of a recipe, or the first comment of another preset."""
    try:
        document = read_document(path, path.name)
    except WrapqError:
        return "(cannot be read)"
    if kind == "recipe":
        return " ".join(str(document.data.get("description") or "").split())
    lines = [line for line in document.text.splitlines() if line.startswith("#")]
    comments = [line for line in lines if not line.startswith(("# @", "# yaml-language-server"))]
    return comments[0].lstrip("# ").strip() if comments else ""
