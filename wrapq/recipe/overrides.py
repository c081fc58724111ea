"""Applying `key=value`, `+key=value`, `++key=value` and `~key` to the merged tree.

Unlike Hydra, a key that the schema or an algorithm knows can be set without `+`, whether or not a file wrote it; only a
new rule or stage must be added on purpose, so that a misspelt one is not taken for new.
"""

from __future__ import annotations

from hydra.core.override_parser.types import Override

from wrapq.errors import Problem, alike, unknown
from wrapq.recipe.content_policy import forbidden
from wrapq.recipe.merge import Layers, is_spec
from wrapq.recipe.provenance import Provenance
from wrapq.recipe.schema import ORDERED
from wrapq.recipe.yaml_reader import MAX_DEPTH, KeyPath


def apply_override(layers: Layers, override: Override) -> list[Problem]:
    """Apply one override; returns what is wrong with it, in which case nothing is changed."""
    text, key = override.input_line or override.key_or_group, override.key_or_group
    path = tuple(key.split("."))
    source = f"override {text}"
    if override.package is not None:
        return [Problem(source, "", f"there is no group {key!r} to choose from")]
    value = override.value()
    problems = [Problem(source, "", what) for _, what in forbidden(value)]
    if len(path) > MAX_DEPTH or "" in path:
        problems.append(Problem(source, "", f"{key!r} is no key"))
    if not problems:
        wrong = _cannot_delete if override.is_delete() else _cannot_set
        problems = [problem] if (problem := wrong(layers, override, path, source)) is not None else []
    if problems:
        return problems
    if override.is_delete():
        layers.delete(path)
    else:
        layers.merge(path, value, lambda _: Provenance(override=text))
    return []


def _cannot_set(layers: Layers, override: Override, path: KeyPath, source: str) -> Problem | None:
    if override.is_add() and layers.has(path) and not isinstance(override.value(), dict | list):
        return Problem(source, "", f"{'.'.join(path)} is there already; leave out the + to change it")
    for above in (path[:depth] for depth in range(1, len(path))):
        held = layers.get(above)
        if not (held is None or isinstance(held, dict) or (isinstance(held, str) and is_spec(above))):
            return Problem(source, "", f"{'.'.join(above)} holds {held!r}, which has no keys to set; replace it whole")
    adds = override.is_add() or override.is_force_add()
    if not adds and len(path) > 1 and path[0] in ORDERED and not layers.has(path[:2]):
        kind = "rule" if path[0] == "rules" else "stage"
        names = tuple(layers.get(path[:1]) or ())
        return unknown(source, "", kind, path[1], names, f"to add a {kind} of that name write +{override.input_line}")
    return None


def _cannot_delete(layers: Layers, override: Override, path: KeyPath, source: str) -> Problem | None:
    key, expected, held = ".".join(path), override.value(), layers.get(path)
    if not layers.has(path):
        siblings = layers.get(path[:-1])
        names = [".".join((*path[:-1], name)) for name in siblings] if isinstance(siblings, dict) else []
        return Problem(source, "", f"there is no {key!r} to remove", tuple(f"~{name}" for name in alike(key, names)))
    if expected is not None and expected != held:
        return Problem(source, "", f"{key} is {held!r}, not {expected!r}; nothing is removed")
    return None
