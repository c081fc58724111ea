"""From plain data to the schema's models, with every mistake reported in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from wrapq.errors import Problem
from wrapq.recipe.documents import KeyPath
from wrapq.recipe.layers import Layers, is_spec
from wrapq.recipe.schema import Match, Recipe, Rule, Settings
from wrapq.recipe.spec_patch import SpecFields
from wrapq.recipe.suggest import unknown

M = TypeVar("M", bound=BaseModel)
MISSING = "???"
_SYNONYMS = {"bit": "dtype", "type": "dtype", "calibrat": "observer", "scale": "granularity", "zero": "symmetric"}


def build(model: type[M], data: dict[str, Any], layers: Layers) -> tuple[M | None, list[Problem]]:
    """The model that `data` makes, or None and everything that is wrong with it."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        skip = set(missing_paths(data))
        return None, [p for e in error.errors() if (path := _path(e)) not in skip for p in [_problem(e, path, layers)]]


def missing_problems(layers: Layers) -> list[Problem]:
    """One problem for each key that a file leaves for the user to set (`???`)."""
    return [
        Problem(at(layers, path), f"{'.'.join(path)} has no value", remedy=f"set it: {'.'.join(path)}=VALUE")
        for path in missing_paths(layers.data)
    ]


def missing_paths(data: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths whose value is `???`."""
    if data == MISSING:
        yield path
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from missing_paths(value, (*path, key))


def at(layers: Layers, path: KeyPath) -> str:
    """`source: dotted.path`, the way a problem says where it is."""
    source = layers.source(path)
    return f"{source}: {'.'.join(path)}" if source else ".".join(path)


def _path(error: Any) -> KeyPath:
    return tuple(str(step) for step in error["loc"] if step != "[key]")


def _problem(error: Any, path: KeyPath, layers: Layers) -> Problem:
    kind, value, where = error["type"], error["input"], at(layers, path)
    if kind == "extra_forbidden":
        return _unknown_key(where, path)
    if kind == "missing":
        return _missing_key(layers, path)
    if error["loc"] and error["loc"][-1] == "[key]":
        return Problem(where, f"{value!r} is no name: use letters, digits, _ and -")
    if kind in ("value_error", "assertion_error"):
        return Problem(where, str(error["ctx"]["error"]))
    if kind == "literal_error":
        return unknown(where, "value", str(value), [word.strip("' ") for word in _expected(error)])
    if kind == "string_pattern_mismatch":
        return Problem(where, f"{value!r} is not allowed here", remedy=_pattern_remedy(path))
    return Problem(where, f"{_show(value)} is wrong here: {_SAYS.get(kind) or error['msg']}")


_SAYS = {
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "string_type": "a text is expected",
    "dict_type": "a mapping of keys to values is expected",
    "model_type": "a mapping of keys to values is expected",
    "list_type": "a list is expected",
    "string_too_short": "a text is expected, not an empty one",
}


def _pattern_remedy(path: KeyPath) -> str:
    if path == ("runtime", "device"):
        return "use auto, cpu, mps, cuda or cuda:N"
    return "use letters, digits, _, - and dots: it becomes the name of a folder"


def _expected(error: Any) -> list[str]:
    return error["ctx"]["expected"].replace(" or ", ", ").split(",")


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _missing_key(layers: Layers, path: KeyPath) -> Problem:
    parent, key = path[:-1], path[-1]
    if len(path) == 3 and path[0] == "rules" and key == "match":
        remedy = "say which modules the rule is for, such as match: {type: Linear}"
    elif len(path) == 3 and path[0] == "stack" and key == "algorithm":
        remedy = "say which algorithm the stage runs, such as algorithm: rtn"
    else:
        remedy = f"set it: {'.'.join(path)}=VALUE"
    return Problem(at(layers, parent) if parent else ".".join(path), f"the key {key!r} is missing", remedy=remedy)


def _unknown_key(where: str, path: KeyPath) -> Problem:
    key, names = path[-1], _names_at(path[:-1])
    if is_spec(path[:-1]):
        meant = next((name for part, name in _SYNONYMS.items() if part in key), None)
        if meant:
            rest = ", ".join(name for name in names if name != meant)
            return Problem(where, f"unknown key {key!r}", (meant,), f"the keys of a spec are: {meant}, {rest}")
    return unknown(where, "key", key, names)


def _names_at(path: KeyPath) -> tuple[str, ...]:
    """The keys that the schema knows in the mapping at `path`."""
    if not path:
        return tuple(Recipe.model_fields) + tuple(Settings.model_fields)
    if path[0] == "rules":
        if len(path) == 3 and path[2] == "match":
            return tuple(Match.model_fields)
        return tuple(SpecFields.model_fields if is_spec(path) else Rule.model_fields)
    owner: Any = Recipe if path[0] in Recipe.model_fields else Settings
    annotation = owner.model_fields[path[0]].annotation
    models = [annotation, *get_args(annotation)]
    return tuple(next((tuple(m.model_fields) for m in models if hasattr(m, "model_fields")), ()))
