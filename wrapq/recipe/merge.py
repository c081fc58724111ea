"""Merging the files of a recipe and its overrides, remembering for every key who wrote it last.

Mappings merge key by key, everything else is replaced. Two things are particular to recipes:

* a spec may be written as a word (`int4:g128:sym`). A mapping merged onto it patches it, so it is taken apart first; a
  word written over a mapping replaces the whole spec and leaves nothing behind;
* rules and stages are ordered, and an entry which a defaults list created (`/scheme@rules.linear`) takes its place in
  the order where the text of a file first names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wrapq.errors import Problem, SpecError
from wrapq.quant.short_form import parse_fields
from wrapq.quant.spec import FLOAT, QuantSpec
from wrapq.recipe.provenance import Provenance
from wrapq.recipe.schema import ORDERED
from wrapq.recipe.yaml_reader import Document, KeyPath

SPEC_KEYS = ("weight", "input", "output", "activation", "activations")


class Layers:
    """A tree of plain data with the source of every key."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.sources: dict[KeyPath, Provenance] = {}
        self.problems: list[tuple[KeyPath, str]] = []
        self._unplaced: set[KeyPath] = set()
        self._patched_words: set[KeyPath] = set()

    def add_file(self, document: Document, package: KeyPath, choice: str) -> None:
        """Merge a file's content under `package`; `choice` is the override that chose the file, or empty."""
        body = {key: value for key, value in document.data.items() if key != "defaults"}
        entry = package[:2]
        if len(entry) == 2 and entry[0] in ORDERED and self.get(entry) is None:
            self._unplaced.add(entry)
        self.merge(package, body, lambda path: document.source(path[len(package) :], choice))

    def merge(self, path: KeyPath, value: Any, source: Callable[[KeyPath], Provenance]) -> None:
        """Merge `value` into the tree at `path`, making the mappings on the way."""
        parent = self.data
        for depth in range(1, len(path)):
            parent = self._mapping(parent, path[:depth], source)
        for below, item in [(path, value)] if path else [((key,), item) for key, item in value.items()]:
            self._merge(parent, below, item, source)

    def get(self, path: KeyPath) -> Any:
        """The value at `path`, None when there is none."""
        value: Any = self.data
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def has(self, path: KeyPath) -> bool:
        """Whether `path` is written anywhere, be it with null."""
        parent = self.get(path[:-1])
        return isinstance(parent, dict) and path[-1] in parent

    def delete(self, path: KeyPath) -> None:
        """Remove the key at `path` and all below it."""
        del self.get(path[:-1])[path[-1]]
        self._forget(path)
        self.sources.pop(path, None)

    def source(self, path: KeyPath) -> Provenance | None:
        """Who wrote the key at `path`, or its nearest parent."""
        while path and path not in self.sources:
            path = path[:-1]
        return self.sources.get(path)

    def problem(self, path: KeyPath, what: str, nearest: tuple[str, ...] = (), remedy: str = "") -> Problem:
        """What is wrong with the key at `path`, with who wrote it."""
        return Problem(str(self.source(path) or ""), ".".join(path), what, nearest, remedy)

    def leaves(self) -> dict[str, Provenance]:
        """The source of every key that holds a value or, within a spec, patches one; by dotted path."""
        return {
            ".".join(path): source
            for path, source in self.sources.items()
            if not isinstance(value := self.get(path), dict) or not value
        }

    def fold_specs(self) -> None:
        """Write the specs that were taken apart as words again; those that make no sense are left for the schema."""
        for path in sorted(self._patched_words):
            fields = self.get(path)
            if not isinstance(fields, dict):
                continue
            try:
                word = str(QuantSpec.from_fields(fields))
            except (SpecError, TypeError, AttributeError) as error:
                self.problems.append((path, str(error)))
                continue
            self.get(path[:-1])[path[-1]] = word

    def _merge(self, parent: dict[str, Any], path: KeyPath, value: Any, source: Callable) -> None:
        if not isinstance(value, dict):
            if isinstance(parent.get(path[-1]), dict):
                self._forget(path)
            parent[path[-1]] = value
            self.sources[path] = source(path)
            return
        mapping = self._mapping(parent, path, source)
        self.sources[path] = source(path)
        places = len(path) == 1 and self._places(path[0], value)
        for name, item in value.items():
            below = (*path, name)
            if places and below in self._unplaced:
                mapping[name] = mapping.pop(name)
                self._unplaced.discard(below)
            self._merge(mapping, below, item, source)

    def _places(self, section: str, value: dict[str, Any]) -> bool:
        """Whether `value` says the order of what files chosen by name brought to `section`.

        Rules stand where a recipe names them. A stage is often named for the sake of an option only: the order is said
        where all are named.
        """
        waiting = {path[1] for path in self._unplaced if path[0] == section}
        return section == "rules" or (section in ORDERED and waiting <= value.keys())

    def _mapping(self, parent: dict[str, Any], path: KeyPath, source: Callable) -> dict[str, Any]:
        """The mapping at `path`; where there is none it is made, of a spec's word by taking that apart."""
        held = parent.get(path[-1])
        if isinstance(held, dict):
            return held
        mapping: dict[str, Any] = {}
        if isinstance(held, str) and held != FLOAT and is_spec(path):
            try:
                mapping = {n: str(value) if n == "dtype" else value for n, value in parse_fields(held).items()}
            except SpecError as error:
                self.problems.append((path, str(error)))
            else:
                self.sources |= dict.fromkeys(((*path, name) for name in mapping), self.sources[path])
                self._patched_words.add(path)
        parent[path[-1]] = mapping
        self.sources[path] = source(path)
        return mapping

    def _forget(self, path: KeyPath) -> None:
        """Drop the sources of everything below `path`, whose content is about to be replaced."""
        depth = len(path)
        for other in [p for p in self.sources if len(p) > depth and p[:depth] == path]:
            del self.sources[other]
        self._patched_words = {p for p in self._patched_words if p[:depth] != path}


def is_spec(path: KeyPath) -> bool:
    """Whether the key at `path` holds a spec: `rules.NAME.weight` and the like, or `rules.NAME.points.POINT`."""
    if len(path) < 3 or path[0] != "rules":
        return False
    return (len(path) == 3 and path[2] in SPEC_KEYS) or (len(path) == 4 and path[2] == "points")
