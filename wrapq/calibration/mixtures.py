"""The experts of a mixture are alike: what is found of the first of a layer holds for all."""

from __future__ import annotations

from torch import nn

from wrapq.wrappers.experts import Experts


class Mixtures:
    """The layers of a model whose experts are modules, see `wrapq.wrappers.experts`, by the names of their parts."""

    def __init__(self, model: nn.Module) -> None:
        self._counts = {name: len(module) for name, module in model.named_modules() if isinstance(module, Experts)}

    def layer(self, name: str) -> str | None:
        """The layer of which `name` is a part of the first expert; None where it is none."""
        layer, _, index = name.rpartition(".")[0].rpartition(".")
        return layer if index == "0" and layer in self._counts else None

    def names(self, name: str) -> tuple[str, ...]:
        """What the part of the first expert called `name` is called in each; `name` alone where it is none."""
        if (layer := self.layer(name)) is None:
            return (name,)
        return tuple(f"{layer}.{index}.{name.rpartition('.')[2]}" for index in range(self._counts[layer]))
