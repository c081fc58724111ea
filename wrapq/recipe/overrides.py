"""Applying `key=value`, `+key=value`, `++key=value` and `~key` to the merged tree.

Unlike Hydra, a key that the schema or an algorithm knows can be set without `+`, whether or not a file wrote it; only a
new rule or stage must be added on purpose, so that a misspelt one is not taken for new.
"""

from __future__ import annotations

from hydra.core.override_parser.types import Override

from wrapq.errors import Problem
from wrapq.recipe.content import forbidden
from wrapq.recipe.documents import MAX_DEPTH, KeyPath
from wrapq.recipe.layers import ORDERED, Layers, is_spec
from wrapq.recipe.provenance import Source
from wrapq.recipe.suggest import alike, unknown


def apply_override(layers: Layers, override: Override) -> list[Problem]:
    """Apply one override; returns what is wrong with it, in which case nothing is changed."""
    text = override.input_line or override.key_or_group
    path = tuple(override.key_or_group.split("."))
    where = f"override {text}"
    if override.package is not None:
        return [Problem(where, f"there is no group {override.key_or_group!r} to choose from")]
    value = override.value()
    problems = [Problem(where, what) for _, what in forbidden(value)]
    if len(path) > MAX_DEPTH or "" in path:
        problems.append(Problem(where, f"{override.key_or_group!r} is no key"))
    problems = problems or _path_problems(layers, override, path, where)
    if problems:
        return problems
    if override.is_delete():
        layers.delete(path)
    else:
        layers.merge(path, value, lambda _: Source(override=text))
    return []


def _path_problems(layers: Layers, override: Override, path: KeyPath, where: str) -> list[Problem]:
    if override.is_delete():
        return _delete_problems(layers, override, path, where)
    if override.is_add() and layers.has(path) and not isinstance(override.value(), dict | list):
        return [Problem(where, f"{'.'.join(path)} is there already; leave out the + to change it")]
    for depth in range(1, len(path)):
        held = layers.get(path[:depth])
        takes_keys = held is None or isinstance(held, dict) or (isinstance(held, str) and is_spec(path[:depth]))
        if not takes_keys:
            return [
                Problem(where, f"{'.'.join(path[:depth])} holds {held!r}, which has no keys to set; replace it whole")
            ]
    adds = override.is_add() or override.is_force_add()
    if not adds and len(path) > 1 and path[0] in ORDERED and not layers.has(path[:2]):
        kind = "rule" if path[0] == "rules" else "stage"
        names = tuple(layers.get(path[:1]) or ())
        return [unknown(where, kind, path[1], names, f"to add a {kind} of that name write +{where.split(' ', 1)[1]}")]
    return []


def _delete_problems(layers: Layers, override: Override, path: KeyPath, where: str) -> list[Problem]:
    if not layers.has(path):
        siblings = layers.get(path[:-1])
        names = [".".join((*path[:-1], key)) for key in siblings] if isinstance(siblings, dict) else []
        key = ".".join(path)
        return [Problem(where, f"there is no {key!r} to remove", tuple(f"~{name}" for name in alike(key, names)))]
    expected, held = override.value(), layers.get(path)
    if expected is not None and expected != held:
        return [Problem(where, f"{'.'.join(path)} is {held!r}, not {expected!r}; nothing is removed")]
    return []
