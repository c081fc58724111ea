"""Hydra's defaults lists: which files make up a recipe, in which order, and under which key each lands.

The values are merged by `merge.py`, which keeps the provenance that Hydra drops. Hydra's own configuration is not
composed and no plug-in is searched for, so that `hydra.*` cannot be set from a recipe, and Hydra's global version base
is put back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import Overrides, _create_defaults_list
from hydra.core.default_element import GroupDefault, InputDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.version import VersionBase, setbase
from omegaconf import OmegaConf

from wrapq.errors import Problem, RecipeError, unknown
from wrapq.recipe.preset_index import PRIMARY, RECIPE, Library
from wrapq.recipe.yaml_reader import Document, KeyPath

_MAX_LOADS = 2000  # files that defaults lists may pull in: two lines each including the next twice double every time


@dataclass(frozen=True)
class Layer:
    """One file of a composition, in merge order.

    Attributes:
        document: what the file says.
        package: the key under which its content lands; empty for the top.
        choice: the defaults-list key that chose it (`scheme@rules.linear`), None for a file that no group chose.
    """

    document: Document
    package: KeyPath
    choice: str | None


@dataclass(frozen=True)
class Defaults:
    """The files to merge, the overrides that set single keys, and the name chosen for every group."""

    layers: tuple[Layer, ...]
    overrides: tuple[Override, ...]
    choices: dict[str, str | None]


def parse_override(text: str) -> Override:
    """The override that `text` says; raises `RecipeError`, with the quoting that usually helps, when it says none."""
    if re.search(r"[\ud800-\udfff]", text):  # bytes of a name in a folder, which no record can hold
        raise RecipeError([Problem(f"override {text}", "", "is not UTF-8", remedy="give the file another name")])
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
        sweeps = override.is_sweep_override()
        override.value()
    except MemoryError:
        raise
    except Exception:  # the generated parser and Hydra's casts raise errors of many kinds
        key, _, value = text.partition("=")
        quoted = f"'{key}=\"{value}\"'" if "=" in value and '"' not in value else "'key=\"...\"'"
        remedy = f"write key=value, +key=value to add, ~key to remove; quote a value with special characters: {quoted}"
        raise RecipeError([Problem(f"override {text}", "", "cannot be parsed", remedy=remedy)]) from None
    if sweeps:
        remedy = "write a list as key=[a,b], or quote one value with a comma in it: 'key=\"a,b\"'"
        raise RecipeError([Problem(f"override {text}", "", "gives several values where one is needed", remedy=remedy)])
    return override


def compose_defaults(library: Library, overrides: Sequence[Override]) -> Defaults:
    """Hydra's defaults list of the primary config under `overrides`; raises `RecipeError` when it cannot be made."""
    with _hydra_state():
        repository = _Repository(library)
        try:
            chosen = _Choices(repository, library, overrides)
            files, _ = _create_defaults_list(repository, PRIMARY, chosen, prepend_hydra=False, skip_missing=False)
            chosen.ensure_overrides_used()
            chosen.ensure_deletions_used()
        except RecipeError:
            raise
        except RecursionError:
            raise RecipeError([_problem("the defaults lists of these files include each other")]) from None
        except MissingConfigException as error:
            raise RecipeError([_missing(library, error)]) from None
        except Exception as error:  # Hydra reports a bad defaults list by exceptions of many kinds, asserts among them
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = " ".join(lines[:2]) or f"cannot be composed ({type(error).__name__})"
            raise RecipeError([_problem(what)]) from None
    layers = tuple(
        Layer(library.document(path), tuple(filter(None, (file.package or "").split("."))), file.override_key)
        for file in files
        if (path := file.config_path) is not None
    )
    return Defaults(layers, tuple(chosen.config_overrides), dict(chosen.known_choices))


class _Choices(Overrides):
    """Hydra's book of what is chosen for each group, which refuses a choice with the place of the mistake."""

    def __init__(self, repository: _Repository, library: Library, overrides: Sequence[Override]) -> None:
        super().__init__(repository, list(overrides))
        self.library, self.texts = library, {o.get_key_element().lstrip("~"): o.input_line or "" for o in overrides}

    def set_known_choice(self, default: InputDefault) -> None:
        """Remember what is chosen for a group, once."""
        if isinstance(default, GroupDefault):
            key = default.get_override_key()
            before = self.known_choices.get(key)
            if key in self.known_choices and (default.get_name() is not None or before is not None):
                listed, remedy = self.library.listed_in(key), f"to change a choice write override /{key}: NAME"
                raise RecipeError([_problem(f"{key} is chosen twice", ", ".join(listed), remedy)])
        super().set_known_choice(default)

    def ensure_overrides_used(self) -> None:
        """Refuse a change of what nothing chooses."""
        for key in (key for key, override in self.override_metadata.items() if not override.used):
            what = f"nothing in this recipe chooses {key!r}"
            others = tuple(sorted(self.known_choices_per_group.get(key.partition("@")[0], ())))
            if (file := self.override_metadata[key].containing_config_path) is not None:
                raise RecipeError([Problem(str(self.library.document(file).source(("defaults",))), "", what, others)])
            text = self.texts[key]
            raise RecipeError([Problem(f"override {text}", "", what, others, f"to add one write +{text}")])

    def ensure_deletions_used(self) -> None:
        """Refuse the removal of what nothing chooses."""
        for key in (key for key, deletion in self.deletions.items() if not deletion.used):
            raise RecipeError([Problem(f"override {self.texts[key]}", "", f"nothing in this recipe chooses {key!r}")])


def _problem(what: str, source: str = "", remedy: str = "") -> Problem:
    return Problem(source, "" if source else "defaults", what, remedy=remedy)


def _missing(library: Library, error: MissingConfigException) -> Problem:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group.startswith("recipe/"):
        group, name = "recipe", f"{group.removeprefix('recipe/')}/{name}"
    source = library.chosen_in(group, name)
    names = library.options(group)
    if not names:
        return _problem(f"there is no group {group!r} to choose {name!r} from", source)
    return unknown(source, "" if source else "defaults", group, name, names)


class _LibrarySource(ConfigSource):
    """Lets Hydra read defaults lists, and only those, from the library."""

    def __init__(self, library: Library) -> None:
        super().__init__("wrapq", "wrapq://")
        self.library = library

    @staticmethod
    def scheme() -> str:
        return "wrapq"

    def load_config(self, config_path: str) -> ConfigResult:
        config_path = config_path.removesuffix(".yaml")
        if not self.library.has(config_path):
            raise ConfigLoadError(f"no such preset: {config_path}")
        # only what decides the composition goes to Hydra; a file that has no content of its own still counts as one
        config = OmegaConf.create({"defaults": self.library.defaults(config_path)})
        # where the content lands when nothing else says so: at the top for a recipe, under its group else
        header = {"package": "_global_" if config_path.split("/")[0] in (RECIPE, PRIMARY) else None}
        return ConfigResult(self.provider, self.library.document(config_path).label, config, header)

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return self.library.is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        return self.library.has(config_path.removesuffix(".yaml"))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return list(self.library.options(config_path)) if results_filter != ObjectType.GROUP else []


class _Repository(ConfigRepository):
    """Counts what is loaded, so that files which include each other over and over end in an error, not in hours."""

    def __init__(self, library: Library) -> None:
        # the base class would look its sources up among Hydra's plug-ins
        self.sources = [_LibrarySource(library), StructuredConfigSource("schema", "structured://")]
        self.loaded: dict[str, ConfigResult | None] = {}
        self.loads = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        self.loads += 1
        if self.loads > _MAX_LOADS:
            raise RecipeError([_problem(f"the defaults lists pull in more than {_MAX_LOADS} files")])
        if config_path not in self.loaded:
            self.loaded[config_path] = super().load_config(config_path)
        return self.loaded[config_path]


@contextmanager
def _hydra_state() -> Iterator[None]:
    """Hydra's version_base is a global: set for the time of one composition."""
    version = VersionBase.instance()
    before: Any = version.getbase()
    setbase("1.3")
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        version.version_base = before
