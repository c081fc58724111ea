"""The only file that knows Hydra: its override grammar and its defaults lists.

Hydra decides which files make up a recipe, in which order and under which key each lands; the values are merged by
`layers.py`, which keeps the provenance that Hydra drops. Hydra's own configuration is not composed, no plug-in is
searched for and no global state of Hydra is left behind, so that `hydra.*` cannot be set from a recipe.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.version import VersionBase, setbase
from omegaconf import OmegaConf

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.documents import Document, KeyPath
from wrapq.recipe.library import PRIMARY, Library
from wrapq.recipe.suggest import unknown

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
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
        sweeps = override.is_sweep_override()
        override.value()
    except Exception:  # the generated parser and Hydra's casts raise errors of many kinds
        key, _, value = text.partition("=")
        quoted = f"'{key}=\"{value}\"'" if "=" in value and '"' not in value else "'key=\"...\"'"
        remedy = f"write key=value, +key=value to add, ~key to remove; quote a value with special characters: {quoted}"
        raise RecipeError([Problem(f"override {text}", "cannot be parsed", remedy=remedy)]) from None
    if sweeps:
        remedy = "write a list as key=[a,b], or quote one value with a comma in it: 'key=\"a,b\"'"
        raise RecipeError([Problem(f"override {text}", "gives several values where one is needed", remedy=remedy)])
    return override


def compose_defaults(library: Library, overrides: Sequence[Override]) -> Defaults:
    """Hydra's defaults list of the primary config under `overrides`; raises `RecipeError` when it cannot be made."""
    with _hydra_state():
        repository = _Repository(_make_repository(library))
        try:
            result = create_defaults_list(repository, PRIMARY, list(overrides), prepend_hydra=False, skip_missing=False)
        except RecipeError:
            raise
        except RecursionError:
            raise RecipeError([Problem("defaults", "the defaults lists of these files include each other")]) from None
        except MissingConfigException as error:
            raise RecipeError([_missing(library, error)]) from None
        except Exception as error:  # Hydra reports a bad defaults list by exceptions of many kinds, asserts among them
            raise RecipeError([_composition_problem(library, overrides, error)]) from None
    return _as_defaults(library, result)


def _as_defaults(library: Library, result: DefaultsList) -> Defaults:
    layers = tuple(
        Layer(
            library.document(default.config_path),
            tuple(filter(None, (default.package or "").split("."))),
            default.override_key,
        )
        for default in result.defaults
        if default.config_path is not None
    )
    return Defaults(layers, tuple(result.config_overrides), dict(result.overrides.known_choices))


def _missing(library: Library, error: MissingConfigException) -> Problem:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group.startswith("recipe/"):
        group, name = "recipe", f"{group.removeprefix('recipe/')}/{name}"
    where = library.where_chosen(group, name) or "defaults"
    names = library.options(group)
    if not names:
        return Problem(where, f"there is no group {group!r} to choose {name!r} from")
    return unknown(where, group, name, names)


def _composition_problem(library: Library, overrides: Sequence[Override], error: Exception) -> Problem:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:2]) or f"cannot be composed ({type(error).__name__})"
    file = _IN_FILE.match(message)
    where = library.document(file[1]).where(("defaults",)) if file else "defaults"
    if twice := _TWICE.search(message):
        key = twice[1] or twice[2]
        listed = ", ".join(library.where_listed(key)) or where
        return Problem(listed, f"{key} is chosen twice", remedy=f"to change a choice write override /{key}: NAME")
    if not (match := _NOT_CHOSEN.search(message)):
        return Problem(where, message)
    key, known = match[2], tuple(re.findall(r"[\w/]+@[\w.]+", message.partition("Did you mean")[2]))
    override = next((o for o in overrides if o.get_key_element().lstrip("~") == key), None)
    text = override.input_line if override and not file else None
    remedy = f"to add one write +{text}" if text and match[1] == "override" else ""
    return Problem(f"override {text}" if text else where, f"nothing in this recipe chooses {key!r}", known, remedy)


_IN_FILE = re.compile(r"In '([^']+)': ")
_TWICE = re.compile(r"Multiple values for ([^ ]+)\. |^([^ ]+) appears more than once")
_NOT_CHOSEN = re.compile(r"Could not (override|delete) '([^'=]+)[^']*'")


class _LibrarySource(ConfigSource):
    """Lets Hydra read defaults lists, and only those, from the library."""

    library: Library

    @staticmethod
    def scheme() -> str:
        return "wrapq"

    def load_config(self, config_path: str) -> ConfigResult:
        config_path = config_path.removesuffix(".yaml")
        if not self.library.has(config_path):
            raise ConfigLoadError(f"no such preset: {config_path}")
        document = self.library.document(config_path)
        # only what decides the composition goes to Hydra; a file that has no content of its own still counts as one
        config = OmegaConf.create({"defaults": self.library.defaults(config_path)})
        header = {"package": self.library.package(config_path)}
        return ConfigResult(provider=self.provider, path=document.label, config=config, header=header)

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return self.library.is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        return self.library.has(config_path.removesuffix(".yaml"))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return list(self.library.options(config_path)) if results_filter != ObjectType.GROUP else []


class _Repository(CachingConfigRepository):
    """Counts what is loaded, so that files which include each other over and over end in an error, not in hours."""

    def __init__(self, delegate: ConfigRepository) -> None:
        self.delegate = delegate  # the base class would copy it, and the library with it
        self.cache: dict[str, ConfigResult | None] = {}
        self.loads = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        self.loads += 1
        if self.loads > _MAX_LOADS:
            raise RecipeError([Problem("defaults", f"the defaults lists pull in more than {_MAX_LOADS} files")])
        return super().load_config(config_path)


def _make_repository(library: Library) -> ConfigRepository:
    SourcesRegistry.instance().register(StructuredConfigSource)
    path = ConfigSearchPathImpl()
    path.append("schema", "structured://")
    repository = ConfigRepository(path)
    source = _LibrarySource("wrapq", "wrapq://")
    source.library = library
    repository.sources.insert(0, source)
    return repository


@contextmanager
def _hydra_state() -> Iterator[None]:
    """Hydra's version_base is a global: set for the time of one composition."""
    version = VersionBase.instance()
    before: Any = version.getbase()
    setbase("1.3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        version.version_base = before
