"""The presets that one composition may draw on, by the paths under which Hydra knows them.

`GROUP/NAME` is a file of a conf folder, `recipe/NAME` one of a recipes folder, `config` the primary config. Every file
is read and checked once. What a recipe may not do (set up the machine, hold code) is refused here, file by file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.content import content_problems
from wrapq.recipe.documents import Document, read_document
from wrapq.recipe.presets import GROUPS, SETTINGS_GROUPS, SUFFIX, Root, option_names, preset_roots
from wrapq.recipe.provenance import Origin

PRIMARY = "config"
_MAX_PATH = 1024
_PACKAGE_HEADER = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
RECIPE = "recipe"
_SETTINGS_REASON = "belongs to the machine, not to a recipe: set it on the command line"


class Library:
    """The files under some roots, and perhaps one recipe file chosen by its path with the files beside it."""

    def __init__(self, extra_dirs: Sequence[Path] = (), recipe_file: Path | None = None) -> None:
        self.roots = preset_roots(extra_dirs)
        self.recipe_file = recipe_file
        self._documents: dict[str, Document] = {}

    def has(self, config_path: str) -> bool:
        """Whether there is a file `config_path`."""
        return self._find(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Whether options can be chosen from `config_path`."""
        return config_path in (RECIPE, *GROUPS) or any(
            (folder / rest).is_dir() for folder, rest in self._folders(config_path) if rest
        )

    def options(self, group: str) -> tuple[str, ...]:
        """The names that can be chosen in `group`."""
        if group == RECIPE:
            return tuple(dict.fromkeys(n for root in self._recipe_folders() for n in self._recipe_names(root)))
        return tuple(dict.fromkeys(name for root in self.roots for name in option_names(root.conf / group)))

    def document(self, config_path: str) -> Document:
        """The checked content of a file; raises `RecipeError` with everything that is wrong with it."""
        config_path = config_path.strip("/")
        if config_path not in self._documents:
            found = self._find(config_path)
            if found is None:
                raise RecipeError([Problem(config_path, "no such preset")])
            document = read_document(found[0], found[1])
            document = replace(document, origin=self._origin(config_path, found[0], document.text))
            problems = [
                *content_problems(document),
                *_package_problems(config_path, document),
                *self._settings_problems(config_path, document),
            ]
            if problems:
                raise RecipeError(problems)
            self._documents[config_path] = document
        return self._documents[config_path]

    def defaults(self, config_path: str) -> list[Any]:
        """The file's defaults list, `override` entries last, which is where Hydra wants them."""
        entries = _entries(self.document(config_path))
        return sorted(entries, key=_is_override)

    def package(self, config_path: str) -> str | None:
        """Where the file's content lands when nothing else says so: at the top for a recipe, under its group else."""
        return "_global_" if config_path.split("/")[0] in (RECIPE, PRIMARY) else None

    def where_chosen(self, group: str, name: str) -> str | None:
        """`file:line` of the defaults list that names the option `name` of `group`, among the files read so far."""
        for document in self._documents.values():
            for key, value, _ in _pairs(document):
                if _group_of(key) == group and value == name:
                    return _where_in_defaults(document, value)
        return None

    def where_listed(self, key: str) -> tuple[str, ...]:
        """`file:line` of every defaults list that chooses at `key` without `override`, among the files read so far."""
        return tuple(
            _where_in_defaults(document, written)
            for document in self._documents.values()
            for listed, _, written in _pairs(document)
            if listed.strip("/") == key
        )

    def _find(self, config_path: str) -> tuple[Path, str] | None:
        config_path = config_path.strip("/")
        if ".." in PurePosixPath(config_path).parts or "\0" in config_path or "\\" in config_path:
            return None
        if config_path == PRIMARY:
            shipped = next(root for root in self.roots if root.name == "wrapq")
            return shipped.conf / f"{PRIMARY}{SUFFIX}", f"conf/{PRIMARY}{SUFFIX}"
        if self.recipe_file and config_path == f"{RECIPE}/{self.recipe_file.stem}":
            return self.recipe_file, _label(self.recipe_file)
        found: dict[Path, Path] = {}
        for folder, rest in self._folders(config_path):
            path = folder / f"{rest}{SUFFIX}"
            if rest and len(str(path)) < _MAX_PATH and path.is_file() and _within(path, folder):
                found.setdefault(path.resolve(), path)
        if len(found) > 1:
            raise RecipeError([_clash(config_path, [self._named(path) for path in found.values()])])
        return next(((path, self._label_of(path)) for path in found.values()), None)

    def _folders(self, config_path: str) -> Iterable[tuple[Path, str]]:
        group, _, rest = config_path.strip("/").partition("/")
        if ".." in PurePosixPath(config_path).parts or "\0" in config_path or len(config_path) > 512:
            return []
        if group == RECIPE:
            return [(folder, rest) for folder in self._recipe_folders()]
        return [(root.conf / group, rest) for root in self.roots] if group in GROUPS else []

    def _recipe_folders(self) -> list[Path]:
        beside = [self.recipe_file.parent] if self.recipe_file else []
        return [*(root.recipes for root in self.roots), *beside]

    def _recipe_names(self, folder: Path) -> Iterable[str]:
        if self.recipe_file and folder == self.recipe_file.parent:
            return [path.stem for path in sorted(folder.glob(f"*{SUFFIX}"))]
        return [name for name in option_names(folder) if name.partition("/")[0] not in GROUPS]

    def _root_of(self, path: Path) -> Root | None:
        folders = ((root, folder) for root in self.roots for folder in (root.conf, root.recipes))
        return next((root for root, folder in folders if path.is_relative_to(folder)), None)

    def _label_of(self, path: Path) -> str:
        root = self._root_of(path)
        return _shipped_label(root, path) if root and root.name == "wrapq" else _label(path)

    def _named(self, path: Path) -> str:
        root = self._root_of(path)
        return f"{self._label_of(path)} of {root.name} {root.version}".strip() if root else _label(path)

    def _origin(self, config_path: str, path: Path, text: str) -> Origin:
        root, digest = self._root_of(path), hashlib.sha256(text.encode()).hexdigest()
        if root is None:
            return Origin(config_path, path.name, "", digest)
        return Origin(config_path, root.package, root.version, digest)

    def _settings_problems(self, config_path: str, document: Document) -> list[Problem]:
        if config_path == PRIMARY or config_path.split("/")[0] in SETTINGS_GROUPS:
            return []
        top = config_path.split("/")[0] == RECIPE
        problems = [
            Problem(f"{document.where((key,))}: {key}", f"{key} {_SETTINGS_REASON}")
            for key in document.data
            if top and key in SETTINGS_GROUPS
        ]
        for key, _, written in _pairs(document):
            touched = {_group_of(key).split("/")[0], *key.partition("@")[2].split(".")[:1]} & set(SETTINGS_GROUPS)
            if touched:
                where = f"{_where_in_defaults(document, written)}: defaults"
                problems.append(Problem(where, f"{min(touched)} {_SETTINGS_REASON}: {written}"))
        return problems


def _clash(config_path: str, places: Sequence[str]) -> Problem:
    group, _, name = config_path.partition("/")
    what = f"{group}={name} is the name of {len(places)} presets: {' and '.join(places)}"
    return Problem("", what, remedy="rename one, or name a recipe by its file")


def _within(path: Path, folder: Path) -> bool:
    # a link in somebody's presets must not lead to the files of whoever runs them
    return path.resolve().is_relative_to(folder.resolve())


def _package_problems(config_path: str, document: Document) -> list[Problem]:
    # where a file lands follows from its folder; a header that says otherwise would be a lie
    allowed = "_global_" if config_path.split("/")[0] in (RECIPE, PRIMARY) else "_group_"
    header = _PACKAGE_HEADER.search(document.text[:512])
    if header is None or header[1] == allowed:
        return []
    return [Problem(document.label, f"# @package {header[1]} is not allowed here; write {allowed} or leave it out")]


def _entries(document: Document) -> list[Any]:
    entries = document.data.get("defaults", [])
    return entries if isinstance(entries, list) else []


def _pairs(document: Document) -> list[tuple[str, Any, str]]:
    """The defaults list as key, name and the text to find it by; a path counts as the option of its folder."""
    pairs: list[tuple[str, Any, str]] = []
    for entry in _entries(document):
        if isinstance(entry, dict):
            pairs += [(str(key), value, str(key)) for key, value in entry.items()]
        elif isinstance(entry, str) and entry != "_self_":
            path, at, package = entry.partition("@")
            group, _, name = path.rpartition("/")
            pairs.append((f"{group}{at}{package}", name, entry))
    return pairs


def _group_of(key: str) -> str:
    return key.split(" ")[-1].partition("@")[0].strip("/")


def _is_override(entry: Any) -> bool:
    return isinstance(entry, dict) and any(str(key).startswith("override ") for key in entry)


def _where_in_defaults(document: Document, text: Any) -> str:
    first = document.lines.get(("defaults",), 1)
    for number, line in enumerate(document.text.splitlines()[first - 1 :], first):
        if str(text) in line.partition("#")[0]:
            return f"{document.label}:{number}"
    return document.where(("defaults",))


def _shipped_label(root: Root, path: Path) -> str:
    kind, folder = ("conf", root.conf) if path.is_relative_to(root.conf) else ("recipes", root.recipes)
    return f"{kind}/{path.relative_to(folder).as_posix()}"


def _label(path: Path) -> str:
    """The path as the user would write it: relative to the working directory when it lies below."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return str(path)
