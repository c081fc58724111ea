"""Reading the YAML of a preset as plain data with line numbers, and nothing else.

A preset may come from a stranger, so the reader builds only mappings, lists, strings, numbers, booleans and null: tags,
anchors and aliases, several documents, duplicate keys, files above 1 MiB and nesting above 32 levels are refused. Words
are read as YAML 1.2 does (`on` and `yes` are strings, `0:8` is no base-60 number).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wrapq.errors import Problem, RecipeError
from wrapq.recipe.provenance import Origin

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

    def where(self, path: KeyPath = ()) -> str:
        """`label:line` of the key at `path`, or of its nearest parent."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.label}:{self.lines[path]}" if path else self.label


def read_document(path: Path, label: str) -> Document:
    """The mapping in the YAML file `path`; raises `RecipeError` when it is not one, naming the line."""
    return parse_document(_read_text(path, label), label)


def parse_document(text: str, label: str) -> Document:
    """The mapping that the YAML `text` holds; raises `RecipeError` when it is not one, naming the line."""
    builder = _Builder(label)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise _refusal(f"{label}{line}", f"not valid YAML: {what}") from None
    data = builder.root if builder.root is not None else {}
    if not isinstance(data, dict):
        raise _refusal(label, f"a preset is a mapping of keys to values, not a {type(data).__name__}")
    return Document(label, data, builder.lines, text)


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(label, f"cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise _refusal(label, f"larger than {MAX_BYTES >> 20} MiB, which no preset is")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(label, f"not UTF-8 text (byte {error.start})") from None


class _Builder:
    """Builds data from parser events with a stack of its own, so that deep nesting cannot exhaust Python's."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.root: Any = None
        self.lines: dict[KeyPath, int] = {}
        self._stack: list[dict[str, Any] | list[Any]] = []
        self._path: list[str | None] = []  # the key awaiting its value at each level, None inside lists
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            self._require(self._documents == 1, line, "holds several YAML documents; a preset is one")
        elif isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self._refuse(line, "YAML anchors and aliases are not allowed in a preset; write the value out")
        elif isinstance(event, yaml.ScalarEvent):
            self._check_tag(event, line)
            self._scalar(event, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._check_tag(event, line)
            self._open({} if isinstance(event, yaml.MappingStartEvent) else [], line)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._stack.pop()
            self._path.pop()
            if self._path:
                self._path[-1] = None

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        if self._stack and isinstance(self._stack[-1], dict) and self._path[-1] is None:
            self._key(event.value, line)
        else:
            self._place(event.value if event.style else plain_value(event.value))

    def _key(self, key: str, line: int) -> None:
        holder = self._stack[-1]
        self._require(key != "<<", line, "YAML merge keys (<<) are not allowed in a preset")
        self._require(key not in holder, line, f"the key {key!r} is written twice")
        self._path[-1] = key
        if all(isinstance(level, dict) for level in self._stack):
            self.lines[tuple(k for k in self._path if k is not None)] = line

    def _open(self, container: dict[str, Any] | list[Any], line: int) -> None:
        waits_for_key = bool(self._stack) and isinstance(self._stack[-1], dict) and self._path[-1] is None
        self._require(not waits_for_key, line, "a key must be a word, not a mapping or a list")
        self._require(len(self._stack) < MAX_DEPTH, line, f"nested deeper than {MAX_DEPTH} levels")
        self._place(container)
        self._stack.append(container)
        self._path.append(None)

    def _place(self, value: Any) -> None:
        if not self._stack:
            self.root = value
            return
        holder = self._stack[-1]
        if isinstance(holder, list):
            holder.append(value)
        else:
            holder[self._path[-1]] = value  # type: ignore[index]  # a key came before
            if not isinstance(value, dict | list):
                self._path[-1] = None  # a container keeps its key on the path until it closes

    def _check_tag(self, event: Any, line: int) -> None:
        self._require(event.tag in _PLAIN_TAGS, line, f"YAML tags such as {event.tag} are not allowed in a preset")

    def _require(self, condition: bool, line: int, what: str) -> None:
        if not condition:
            raise self._refuse(line, what)

    def _refuse(self, line: int, what: str) -> RecipeError:
        return _refusal(f"{self.label}:{line}", what)


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


def _refusal(where: str, what: str) -> RecipeError:
    return RecipeError([Problem(where, what)])
