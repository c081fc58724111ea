"""Plain references between keys: `${model.path}`, whole or within a text."""

from __future__ import annotations

from typing import Any

from wrapq.errors import Problem
from wrapq.recipe.content_policy import REFERENCE
from wrapq.recipe.merge import Layers
from wrapq.recipe.yaml_reader import KeyPath

_MAX_HOPS = 20
_MAX_LENGTH = 4096  # references that double a text at every hop would fill the memory


def resolve_references(layers: Layers) -> list[Problem]:
    """Replace every reference by the value it names; returns what is wrong with those that name none."""
    problems: list[Problem] = []

    def walk(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, path) for item in value]
        try:
            return _value_of(layers, value, 0)
        except ValueError as error:
            problems.append(layers.problem(path, str(error)))
            return None

    layers.data = walk(layers.data, ())
    return problems


def _value_of(layers: Layers, text: Any, hops: int) -> Any:
    if not isinstance(text, str) or "${" not in text:
        return text
    if hops > _MAX_HOPS:
        raise ValueError(f"{text!r} refers to itself")
    if match := REFERENCE.fullmatch(text):
        return _target(layers, match[1], hops)
    out = REFERENCE.sub(lambda match: str(_target(layers, match[1], hops)), text)
    if len(out) > _MAX_LENGTH:
        raise ValueError(f"{text[:60]!r} becomes longer than {_MAX_LENGTH} characters")
    return out


def _target(layers: Layers, name: str, hops: int) -> Any:
    path = tuple(name.split("."))
    if not layers.has(path):
        raise ValueError(f"${{{name}}} names no key")
    value = layers.get(path)
    if isinstance(value, dict | list):
        raise ValueError(f"${{{name}}} names a group of keys; only a single value can be referred to")
    return _value_of(layers, value, hops + 1)
