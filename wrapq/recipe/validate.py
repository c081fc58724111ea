"""From plain data to the schema's models, with every mistake reported in the user's words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from wrapq.errors import Problem, unknown
from wrapq.metrics import metrics
from wrapq.recipe.merge import Layers, is_spec
from wrapq.recipe.schema import Match, Recipe, Rule, Settings
from wrapq.recipe.spec_patch import SpecFields
from wrapq.recipe.yaml_reader import KeyPath

M = TypeVar("M", bound=BaseModel)
MISSING = "???"
_SYNONYMS = {"bit": "dtype", "type": "dtype", "calibrat": "observer", "scale": "granularity", "zero": "symmetric"}


def build(model: type[M], data: dict[str, Any], layers: Layers) -> tuple[M | None, list[Problem]]:
    """The model that `data` makes, or None and everything that is wrong with it."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        skip = set(missing_paths(data))
        located = [(_path(e["loc"]), e) for e in error.errors()]
        return None, [_problem(e, path, layers) for path, e in located if path not in skip]


def _path(location: Sequence[int | str]) -> KeyPath:
    steps = [str(step) for step in location if step != "[key]"]
    return tuple(".".join(steps).split(".")) if steps[:1] == ["goals"] else tuple(steps)  # METRIC.FORMAT is two keys


def missing_problems(layers: Layers) -> list[Problem]:
    """One problem for each key that a file leaves for the user to set (`???`)."""
    return [
        layers.problem(path, f"{'.'.join(path)} has no value", remedy=f"set it: {'.'.join(path)}=VALUE")
        for path in missing_paths(layers.data)
    ]


def missing_paths(data: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths whose value is `???`."""
    if data == MISSING:
        yield path
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from missing_paths(value, (*path, key))


def _problem(error: Any, path: KeyPath, layers: Layers) -> Problem:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return _unknown_key(layers, path)
    if kind == "missing":
        remedies = {
            ("rules", "match"): "say which modules the rule is for, such as match: {type: Linear}",
            ("stack", "algorithm"): "say which algorithm the stage runs, such as algorithm: rtn",
        }
        known = remedies.get((path[0], path[-1])) if len(path) == 3 else None
        what = f"the key {path[-1]!r} is missing"
        return layers.problem(path[:-1] or path, what, remedy=known or f"set it: {'.'.join(path)}=VALUE")
    if error["loc"] and error["loc"][-1] == "[key]":
        return layers.problem(path, f"{value!r} is no name: use letters, digits, _ and -")
    if kind in ("value_error", "assertion_error"):
        return layers.problem(path, str(error["ctx"]["error"]))
    if kind == "literal_error":
        expected = error["ctx"]["expected"].replace(" or ", ", ").split(",")
        return _unknown(layers, path, "value", str(value), [word.strip("' ") for word in expected])
    if kind == "string_pattern_mismatch":
        name = "use letters, digits, _, - and dots: it becomes the name of a folder"
        remedy = "use auto, cpu, mps, cuda or cuda:N" if path == ("runtime", "device") else name
        return layers.problem(path, f"{value!r} is not allowed here", remedy=remedy)
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    under = (
        f"options stand under their format: export.FORMAT.{path[-1]}" if path[0] == "export" and len(path) == 2 else ""
    )
    return layers.problem(path, f"{shown} is wrong here: {_SAYS.get(kind) or error['msg']}", remedy=under)


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


def _unknown_key(layers: Layers, path: KeyPath) -> Problem:
    if path[0] == "goals" and path[1] not in _names_at(path[:1]):
        path = path[:2]
    key, names = path[-1], _names_at(path[:-1])
    meant = next((name for part, name in _SYNONYMS.items() if part in key), None)
    if meant and is_spec(path[:-1]):
        rest = ", ".join(name for name in names if name != meant)
        return layers.problem(path, f"unknown key {key!r}", (meant,), f"the keys of a spec are: {meant}, {rest}")
    return _unknown(layers, path, "key", key, names)


def _unknown(layers: Layers, path: KeyPath, kind: str, name: str, names: Iterable[str]) -> Problem:
    return unknown(str(layers.source(path) or ""), ".".join(path), kind, name, names)


def _names_at(path: KeyPath) -> tuple[str, ...]:
    """The keys that the schema knows in the mapping at `path`."""
    if not path:
        return tuple(Recipe.model_fields) + tuple(Settings.model_fields)
    if path[0] == "rules":
        if len(path) == 3 and path[2] == "match":
            return tuple(Match.model_fields)
        return tuple(SpecFields.model_fields if is_spec(path) else Rule.model_fields)
    if path[0] == "goals":
        return tuple(metric.name for metric in metrics()) if len(path) == 1 else ()
    owner: Any = Recipe if path[0] in Recipe.model_fields else Settings
    annotation = owner.model_fields[path[0]].annotation
    models = [annotation, *get_args(annotation)]
    return tuple(next((tuple(m.model_fields) for m in models if hasattr(m, "model_fields")), ()))
