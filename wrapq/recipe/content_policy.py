"""What no preset and no override may contain: anything that would run code or read the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from wrapq.errors import Problem
from wrapq.recipe.yaml_reader import Document, KeyPath

REFERENCE = re.compile(r"\$\{\s*([A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*)\s*\}")
_RESERVED = re.compile(r"_[a-z_]+_")
_DEFAULTS_REMEDY = "write a list such as: [override /model: hf, /scheme@rules.linear: w4a16, _self_]"


def content_problems(document: Document) -> list[Problem]:
    """Everything in the file that is not plain data, and a defaults list that is none."""
    body = {key: value for key, value in document.data.items() if key != "defaults"}
    problems = [Problem(str(document.source(path)), ".".join(path), what) for path, what in forbidden(body)]
    source, entries = str(document.source(("defaults",))), document.data.get("defaults", [])
    mistakes = (
        [_entry_mistake(entry) for entry in entries] if isinstance(entries, list) else ["defaults must be a list"]
    )
    return problems + [Problem(source, "defaults", what, remedy=_DEFAULTS_REMEDY) for what in mistakes if what]


def forbidden(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """The places in `value` that hold a reserved key or a `${...}` other than a plain reference, and why not."""
    if isinstance(value, dict):
        for key, item in value.items():
            below = (*path, str(key))
            if not isinstance(key, str):
                yield below, f"the key {key!r} is not a word"
            elif _RESERVED.fullmatch(key):
                yield below, f"{key} is not allowed: a recipe is data and names no code"
            yield from forbidden(item, below)
    elif isinstance(value, list):
        for item in value:
            yield from forbidden(item, path)
    elif isinstance(value, str) and "${" in REFERENCE.sub("", value):
        yield path, f"{value!r} is not allowed: ${{...}} may only name another key, such as ${{model.path}}"


def _entry_mistake(entry: Any) -> str:
    if not isinstance(entry, str) and not (isinstance(entry, dict) and len(entry) == 1):
        return f"{entry!r} is no entry of a defaults list"
    if isinstance(entry, dict) and not all(value is None or isinstance(value, str) for value in entry.values()):
        return f"{entry!r} must name one file"
    if "$" in str(entry) or ".." in str(entry):
        return f"{entry!r}: an entry names a group and a file of it, without ${{...}} and without .."
    return ""
