"""Finding the repeated blocks of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from wrapq.runtime.module import original_class


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model, as transformers' decoder layers are; none for a model without.

    Attributes:
        prefix: the name of the list that holds them, such as `model.layers`; empty where there is none.
        count: how many there are.
    """

    prefix: str = ""
    count: int = 0

    def index(self, name: str) -> int | None:
        """The index of the block that the module `name` is or lies in, or None."""
        if not self.count:
            return None
        match = re.match(rf"{re.escape(self.prefix)}\.(\d+)(\.|$)", name)
        return int(match[1]) if match else None

    def names(self) -> tuple[str, ...]:
        """The blocks' names, in order."""
        return tuple(f"{self.prefix}.{i}" for i in range(self.count))


def find_blocks(model: nn.Module) -> Blocks:
    """The `ModuleList` of equal classes that holds the most parameters; wrapped ones count as what they were."""
    best, size = Blocks(), 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({original_class(child) for child in module}) != 1:
            continue
        parameters = sum(p.numel() for p in module.parameters())
        if parameters > size:
            best, size = Blocks(name, len(module)), parameters
    return best
