"""One registry class for everything that is chosen by name: observers, algorithms, data sources, metrics, wrappers."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from wrapq.errors import Problem, ProblemsError, UnknownNameError, WrapqError, nearest

T = TypeVar("T")
C = TypeVar("C", bound="Configurable")
PLUGIN_GROUP = "wrapq.plugins"


class Options(BaseModel):
    """Base of the options that stand beside a name in a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Configurable:
    """Base of what is made from a name and options.

    A subclass that has options of its own names their class, and types them:

        class RankOptions(Options):
            rank: int = Field(8, ge=1, description="Columns of the thin matrices.")

        @ALGORITHMS.register("low_rank")
        class LowRank(Corrector):
            Options = RankOptions
            options: RankOptions

    Attributes:
        Options: the class of its options.
        options: the validated options.
    """

    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.Options() if options is None else options


class Registry(Generic[T]):
    """Names to things, filled by decorators.

    The modules of `package` are imported at the first look-up, so that adding a file with a decorated class is the
    whole registration, and nothing heavy is imported before a name is needed; without a package the entries are
    registered where the registry is made. Other packages register by an entry point in the group `wrapq.plugins` that
    names a module to import.

        @OBSERVERS.register("minmax")
        class MinMax(Observer): ...
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Register the decorated thing under `names`; a name already taken by another thing is refused."""

        def add(entry: T) -> T:
            for name in map(self.normalize, names):
                taken = self._entries.setdefault(name, entry)
                if taken is not entry and _path(taken) != _path(entry):
                    both = f"by {_path(taken)} and by {_path(entry)}"
                    raise WrapqError(f"{self.kind} {name!r} is registered twice: {both}")
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; raises `UnknownNameError` with the nearest names."""
        self._load()
        try:
            return self._entries[self.normalize(name)]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        self._load()
        return self.normalize(name) in self._entries

    @staticmethod
    def normalize(name: str) -> str:
        """Names are compared in lower case, with `-` and spaces as `_`."""
        return name.strip().lower().replace("-", "_").replace(" ", "_")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first, since the modules imported here register into this registry
        if self.package:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
                importlib.import_module(module.name)
        load_plugins()


@dataclass(frozen=True)
class Place:
    """Where a name stands, with the options beside it.

    Attributes:
        path: the dotted path of the mapping that holds both, `stack.round`.
        key: that of the name in it, `algorithm`; empty where the mapping is what is called so.
        beside: the other keys of the mapping, which are no options.
        source: what set a dotted path, as problems quote it.
        owner: what problems call the thing whose options these are; `{}` stands for its name.
        instead: what may be written in place of a name.
    """

    path: str
    key: str
    beside: Iterable[str] = ()
    source: Callable[[str], str] = lambda path: ""
    owner: str = "{}"
    instead: tuple[str, ...] = ()

    def at(self, key: str) -> str:
        """The dotted path of a key of the mapping."""
        return ".".join(filter(None, (self.path, key)))


def build(registry: Registry[type[C]], name: str, options: Mapping[str, Any], place: Place, *arguments: Any) -> C:
    """The thing called `name`, made with the `arguments` and then its `options`.

    Raises:
        ProblemsError: there is none of that name, or with everything that is wrong with the options.
    """
    try:
        kind = registry.get(name)
    except UnknownNameError as error:
        path, what = place.at(place.key), f"unknown {registry.kind} {name!r}"
        raise ProblemsError([Problem(place.source(path), path, what, (*error.nearest, *place.instead))]) from None
    try:
        made = kind.Options.model_validate(dict(options))
    except ValidationError as error:
        raise ProblemsError(list(option_problems(error, place, kind.Options, name))) from None
    return cast(Any, kind)(*arguments, made)


def option_problems(
    error: ValidationError, place: Place, options: type[BaseModel], name: str = ""
) -> Iterator[Problem]:
    """Each mistake in the `options` of `name`, which stand at `place`."""
    owner = place.owner.format(name)
    for item in error.errors():
        key = ".".join(map(str, item["loc"]))
        path = place.at(key)
        if item["type"] == "extra_forbidden":
            valid = nearest(key, [*options.model_fields, *place.beside])
            yield Problem(place.source(path), path, f"{owner} has no option {key!r}", valid)
        elif item["type"] == "missing":
            yield Problem("", path, f"{owner} needs {key}", (), f"set it with {path}=...")
        else:
            what = f"{item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"
            yield Problem(place.source(path), path, what)


def require(package: str, extra: str, what: str = "this", error: type[WrapqError] = WrapqError) -> None:
    """Refuse `what` by an `error` when the optional `package` of the `extra` is not installed; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise error(f"{what} needs the package {package!r}, which is not installed: pip install 'wrapq[{extra}]'")


@cache
def load_plugins() -> tuple[str, ...]:
    """Import, once, the modules that other packages declare in the entry point group `wrapq.plugins`."""
    points = sorted(entry_points(group=PLUGIN_GROUP), key=lambda point: point.name)
    for point in points:
        try:
            point.load()
        except Exception as error:  # another package's code may raise anything
            what = f"the plug-in {point.name} = {point.value!r} cannot be imported: {type(error).__name__}: {error}"
            raise WrapqError(f"{what}\n    mend or uninstall the package that declares it") from error
    return tuple(point.value for point in points)


def _path(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"
