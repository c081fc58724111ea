"""What the suites for kinds of algorithms share: all that is registered of a kind, by whichever package."""

from __future__ import annotations

from typing import TypeVar

import torch

from wrapq.algorithms.base import ALGORITHMS, Algorithm

A = TypeVar("A", bound=Algorithm)

DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def variants(kind: type[A]) -> dict[str, A]:
    """Every registered algorithm of `kind` as it is by default, and with each of its switches turned."""
    found: dict[str, A] = {}
    for name in ALGORITHMS:
        entry = ALGORITHMS.get(name)
        if issubclass(entry, kind):
            found[name] = entry()
            for key, field in entry.Options.model_fields.items():
                if field.annotation is bool:
                    found[f"{name}-{key}"] = entry(entry.Options(**{key: not field.default}))
    return found
