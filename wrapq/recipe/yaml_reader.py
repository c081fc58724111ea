"""Reading the YAML of a preset as plain data with line numbers, and nothing else.

A preset may come from a stranger, so the reader builds only mappings, lists, strings, numbers, booleans and null: tags,
anchors and aliases, several documents, duplicate keys, files above 1 MiB and nesting above 32 levels are refused. Words
are read as YAML 1.2 does (`on` and `yes` are strings, `0:8` is no base-60 number).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.provenance import Origin, Provenance

KeyPath = tuple[str, ...]
MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: value for value in (True, False) for word in (str(value).lower(), str(value), str(value).upper())}
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = frozenset({None, "!"})


@dataclass(frozen=True)
class Document:
    """One YAML file: its data, the line of every key, and the name by which messages call it."""

    label: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    text: str = field(repr=False)
    origin: Origin | None = None

    def source(self, path: KeyPath = (), override: str = "") -> Provenance:
        """The line of the key at `path`, or of its nearest parent, in the file that `override` chose."""
        while path and path not in self.lines:
            path = path[:-1]
        return Provenance(self.label, self.lines.get(path), override, self.origin)


def read_document(path: Path, label: str) -> Document:
    """The mapping in the YAML file `path`; raises `RecipeError` when it is not one, naming the line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _refusal(label, f"larger than {MAX_BYTES >> 20} MiB, which no preset is")
        text = raw.decode("utf-8")
    except OSError as error:
        raise _refusal(label, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise _refusal(label, f"not UTF-8 text (byte {error.start})") from None
    return parse_document(text, label)


def parse_document(text: str, label: str) -> Document:
    """The mapping that the YAML `text` holds; raises `RecipeError` when it is not one, naming the line."""
    reader = _Reader(text, label)
    try:
        data = reader.document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise _refusal(f"{label}{line}", f"not valid YAML: {what}") from None
    if not isinstance(data, dict | None):
        raise _refusal(label, f"a preset is a mapping of keys to values, not a {type(data).__name__}")
    return Document(label, data or {}, reader.lines, text)


class _Reader:
    """Reads parser events as data; `lines` has the line of every key that lies in mappings alone."""

    def __init__(self, text: str, label: str) -> None:
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=_LOADER))
        self.label = label
        self.lines: dict[KeyPath, int] = {}

    def document(self) -> Any:
        starts = (event for event in self.events if isinstance(event, yaml.DocumentStartEvent))
        data = self._value(next(self.events), (), 0) if next(starts, None) else None
        if (second := next(starts, None)) is not None:
            raise self._refusal(second, "holds several YAML documents; a preset is one")
        return data

    def _value(self, event: Any, path: KeyPath | None, depth: int) -> Any:
        """The value that begins with `event`; its path is None within lists."""
        self._check(event)
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else plain_value(event.value)
        if depth >= MAX_DEPTH:
            raise self._refusal(event, f"nested deeper than {MAX_DEPTH} levels")
        items = takewhile(lambda e: not isinstance(e, yaml.CollectionEndEvent), self.events)
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, None, depth + 1) for item in items]
        data: dict[str, Any] = {}
        for item in items:
            key = self._key(item, data)
            below = None if path is None else (*path, key)
            if below is not None:
                self.lines[below] = item.start_mark.line + 1
            data[key] = self._value(next(self.events), below, depth + 1)
        return data

    def _key(self, event: Any, data: Mapping[str, Any]) -> str:
        self._check(event)
        if not isinstance(event, yaml.ScalarEvent):
            raise self._refusal(event, "a key must be a word, not a mapping or a list")
        if event.value == "<<":
            raise self._refusal(event, "YAML merge keys (<<) are not allowed in a preset")
        if event.value in data:
            raise self._refusal(event, f"the key {event.value!r} is written twice")
        return event.value

    def _check(self, event: Any) -> None:
        if event.anchor is not None:  # an alias has one too
            raise self._refusal(event, "YAML anchors and aliases are not allowed in a preset; write the value out")
        if event.tag not in _PLAIN_TAGS:
            raise self._refusal(event, f"YAML tags such as {event.tag} are not allowed in a preset")

    def _refusal(self, event: Any, what: str) -> RecipeError:
        return _refusal(f"{self.label}:{event.start_mark.line + 1}", what)


def plain_value(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _SPECIAL_FLOAT.fullmatch(text):
        return float(f"{match[1]}{match[2].lower()}")
    return text


def _refusal(source: str, what: str) -> RecipeError:
    return RecipeError([Problem(source, "", what)])
