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
from wrapq.foreign import plain
from wrapq.recipe.content_policy import content_problems
from wrapq.recipe.presets import GROUPS, SETTINGS_GROUPS, SUFFIX, Root, option_names, preset_roots
from wrapq.recipe.provenance import Origin
from wrapq.recipe.yaml_reader import Document, read_document

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
                raise RecipeError([Problem(config_path, "", "no such preset")])
            path, label = found
            document = read_document(path, label)
            problems = [*content_problems(document), *_place_problems(config_path, document)]
            if problems:
                raise RecipeError(problems)
            root, digest = self._root_of(path), hashlib.sha256(document.text.encode()).hexdigest()
            package, version = (root.package, root.version) if root else (path.name, "")
            self._documents[config_path] = replace(
                document, origin=Origin(config_path, plain(package), version, digest)
            )
        return self._documents[config_path]

    def defaults(self, config_path: str) -> list[Any]:
        """The file's defaults list, `override` entries last, which is where Hydra wants them."""
        entries = self.document(config_path).data.get("defaults", [])
        return sorted(entries, key=lambda e: isinstance(e, dict) and any(str(k).startswith("override ") for k in e))

    def chosen_in(self, group: str, name: str) -> str:
        """`file:line` of the defaults list that names `name` of `group`; empty when no file read so far does."""
        pairs = ((document, *pair) for document in self._documents.values() for pair in _pairs(document))
        found = (document for document, key, value, _ in pairs if _group_of(key) == group and value == name)
        return next((_source_in_defaults(document, name) for document in found), "")

    def listed_in(self, key: str) -> tuple[str, ...]:
        """`file:line` of every defaults list that chooses at `key` without `override`, among the files read so far."""
        pairs = ((document, *pair) for document in self._documents.values() for pair in _pairs(document))
        return tuple(_source_in_defaults(file, text) for file, listed, _, text in pairs if listed.strip("/") == key)

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
            if not rest or len(str(path)) >= _MAX_PATH or not path.is_file():
                continue
            # a link in somebody's presets must not lead to the files of whoever runs them
            if path.resolve().is_relative_to(folder.resolve()):
                found.setdefault(path.resolve(), path)
        if len(found) > 1:
            places = " and ".join(self._named(path) for path in found.values())
            what = f"{'='.join(config_path.split('/', 1))} is the name of {len(found)} presets: {places}"
            raise RecipeError([Problem("", "", what, remedy="rename one, or name a recipe by its file")])
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
        if root is None or root.name != "wrapq":
            return _label(path)
        kind, folder = ("conf", root.conf) if path.is_relative_to(root.conf) else ("recipes", root.recipes)
        return f"{kind}/{path.relative_to(folder).as_posix()}"

    def _named(self, path: Path) -> str:
        root = self._root_of(path)
        return f"{self._label_of(path)} of {root.name} {root.version}".strip() if root else _label(path)


def _place_problems(config_path: str, document: Document) -> list[Problem]:
    """What the file says that belongs elsewhere: where its content lands, and, in a recipe or part of one, the machine.

    Where a file lands follows from its folder; a header that says otherwise would be a lie.
    """
    kind, problems = config_path.split("/")[0], list[Problem]()
    allowed = "_global_" if kind in (RECIPE, PRIMARY) else "_group_"
    header = _PACKAGE_HEADER.search(document.text[:512])
    if header is not None and header[1] != allowed:
        what = f"# @package {header[1]} is not allowed here; write {allowed} or leave it out"
        problems.append(Problem(document.label, "", what))
    if kind in (PRIMARY, *SETTINGS_GROUPS):
        return problems
    for key in (key for key in document.data if kind == RECIPE and key in SETTINGS_GROUPS):
        problems.append(Problem(str(document.source((key,))), key, f"{key} {_SETTINGS_REASON}"))
    for key, _, written in _pairs(document):
        touched = {_group_of(key).split("/")[0], *key.partition("@")[2].split(".")[:1]} & set(SETTINGS_GROUPS)
        if touched:
            source, what = _source_in_defaults(document, written), f"{min(touched)} {_SETTINGS_REASON}: {written}"
            problems.append(Problem(source, "defaults", what))
    return problems


def _pairs(document: Document) -> list[tuple[str, Any, str]]:
    """The defaults list as key, name and the text to find it by; a path counts as the option of its folder."""
    pairs: list[tuple[str, Any, str]] = []
    entries = document.data.get("defaults", [])
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            pairs += [(str(key), value, str(key)) for key, value in entry.items()]
        elif isinstance(entry, str) and entry != "_self_":
            path, at, package = entry.partition("@")
            group, _, name = path.rpartition("/")
            pairs.append((f"{group}{at}{package}", name, entry))
    return pairs


def _group_of(key: str) -> str:
    return key.split(" ")[-1].partition("@")[0].strip("/")


def _source_in_defaults(document: Document, text: Any) -> str:
    first = document.lines.get(("defaults",), 1)
    for number, line in enumerate(document.text.splitlines()[first - 1 :], first):
        if str(text) in line.partition("#")[0]:
            return f"{document.label}:{number}"
    return str(document.source(("defaults",)))


def _label(path: Path) -> str:
    """The path as the user would write it: relative to the working directory when it lies below."""
    try:
        return plain(path.relative_to(Path.cwd()).as_posix())
    except (ValueError, OSError):
        return plain(str(path))
