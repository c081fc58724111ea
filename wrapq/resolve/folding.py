"""Folding the modules of repeated blocks into one line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def fold(
    rows: Sequence[T], prefix: str, name: Callable[[T], str], key: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Rows that differ only in the index of their block, under one name such as `model.layers.{0-5}.mlp`.

    Args:
        rows: in order.
        prefix: the name of the list of blocks, such as `model.layers`; empty where there is none.
        name: the name of a row's module.
        key: what must be equal for rows to be folded.
    """
    groups: dict[Hashable, list[tuple[int | None, T]]] = {}
    for row in rows:
        match = re.match(rf"{re.escape(prefix)}\.(\d+)(.*)", name(row)) if prefix else None
        index, rest = (int(match[1]), match[2]) if match else (None, name(row))
        groups.setdefault((index is not None, rest, key(row)), []).append((index, row))
    folded = []
    for members in groups.values():
        first = name(members[0][1])
        if members[0][0] is not None and len(members) > 1:
            rest = first[len(prefix) + 1 + len(str(members[0][0])) :]
            first = f"{prefix}.{{{_ranges(index for index, _ in members)}}}{rest}"
        folded.append((first, [row for _, row in members]))
    return folded


def _ranges(indices: Iterable[int | None]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for index in sorted(i for i in indices if i is not None):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
