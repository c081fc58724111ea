"""Folding the modules of repeated blocks into one line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
_Named = tuple[str, Hashable, list[T]]


def fold(
    rows: Sequence[T], prefix: str, name: Callable[[T], str], key: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Rows that differ only in the index of their block, and then in one within it, such as that of an expert, under
    one name: `model.layers.{0-5}.mlp`, `model.layers.{0-5}.mlp.experts.{0-7}.up_proj`.

    Args:
        rows: in order.
        prefix: the name of the list of blocks, such as `model.layers`; empty where there is none.
        name: the name of a row's module.
        key: what must be equal for rows to be folded.
    """
    if not prefix:
        return [(name(row), [row]) for row in rows]
    each = [(name(row), key(row), [row]) for row in rows]
    inside = re.escape(prefix) + r"\."
    by_block = _fold(each, re.compile(rf"({inside})(\d+)(.*)"))
    return [(name, rows) for name, _, rows in _fold(by_block, re.compile(rf"({inside}.*?\.)(\d+)(\..*)"))]


def _fold(rows: Iterable[_Named[T]], pattern: re.Pattern[str]) -> list[_Named[T]]:
    """Rows whose names differ only in the number that `pattern` finds, under one name that has all the numbers."""
    groups: dict[Hashable, list[tuple[re.Match[str] | None, _Named[T]]]] = {}
    for row in rows:
        match = pattern.fullmatch(row[0])
        parts = (row[0], "") if match is None else (match[1], match[3])
        groups.setdefault((match is None, parts, row[1]), []).append((match, row))
    folded = []
    for members in groups.values():
        match, (name, key, _) = members[0]
        if match is not None and len(members) > 1:
            name = f"{match[1]}{{{_ranges(int(m[2]) for m, _ in members if m is not None)}}}{match[3]}"
        folded.append((name, key, [row for _, (_, _, same) in members for row in same]))
    return folded


def _ranges(indices: Iterable[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
