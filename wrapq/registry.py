"""One registry class for everything that is chosen by name: observers, algorithms, data sources, metrics, wrappers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from wrapq.errors import UnknownNameError, WrapqError

T = TypeVar("T")
PLUGIN_GROUP = "wrapq.plugins"


class Registry(Generic[T]):
    """Names to things, filled by decorators.

    The modules of `package` are imported at the first look-up, so that adding a file with a decorated class is the
    whole
    registration, and nothing heavy is imported before a name is needed. Other packages register by an entry point in
    the group `wrapq.plugins` that names a module to import.

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
                    raise WrapqError(
                        f"{self.kind} {name!r} is registered twice: by {_path(taken)} and by {_path(entry)}"
                    )
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
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        load_plugins()


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
