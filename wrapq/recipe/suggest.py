"""Wording of the commonest mistake: a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable

from wrapq.errors import ALIKE, Problem, likeness, nearest


def unknown(where: str, kind: str, name: str, names: Iterable[str], remedy: str = "") -> Problem:
    """The problem that `name` is no `kind`: with the nearest of `names`, or with all of them when none is alike."""
    names = tuple(dict.fromkeys(names))
    close = alike(name, names)
    if not close and names:
        remedy = "\n    ".join(filter(None, (f"there is: {', '.join(names)}", remedy)))
    return Problem(where, f"unknown {kind} {name!r}", close, remedy)


def alike(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names so much like `name` that they may have been meant, best first."""
    names = tuple(names)
    return tuple(n for n in nearest(name, names) if likeness(name, n)[0] >= ALIKE)
