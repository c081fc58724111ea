"""Changes of parameters that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.calibration.slots import Slot
from wrapq.errors import ModelError


class Edits:
    """Changes the parameters of a float model in place, and can undo all that it changed.

    Args:
        model: not wrapped.

    Attributes:
        notes: what a reader of the run should know, such as weights that are no longer tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.notes: list[str] = []
        self._before: dict[tuple[str, str], tuple[nn.Parameter | None, Tensor | None]] = {}
        self._undo: list[Callable[[], object]] = []

    def commit(self) -> None:
        """Keep what was changed; only what comes after can be undone."""
        self._before.clear()
        self._undo.clear()

    def restore(self) -> None:
        """Put every weight back, to the bit, as it was at the last `commit`."""
        for (name, parameter), (tensor, values) in self._before.items():
            if tensor is not None and values is not None:
                tensor.data.copy_(values)
            self._module(name)._parameters[parameter] = tensor
        for undo in reversed(self._undo):
            undo()
        self.commit()

    @torch.no_grad()
    def untie(self, name: str) -> None:
        """Give the module `name` parameters of its own; the model's configuration says so from now on."""
        module = self._module(name)
        for parameter, shared in module._parameters.items():
            if shared is None or not (others := self._others(name, parameter)):
                continue
            self._before.setdefault((name, parameter), (shared, None))
            module._parameters[parameter] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            self.notes.append(f"{name}.{parameter} is no longer tied to {', '.join(others)}, and is stored beside it")
            config: Any = getattr(self.model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                self._undo.append(partial(setattr, config, "tie_word_embeddings", True))

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _others(self, name: str, parameter: str) -> list[str]:
        """The modules that have the very same parameter."""
        tensor = self._module(name)._parameters[parameter]
        owners = [other for other in self._owners.get(id(tensor), ()) if other != name]
        return [other for other in owners if any(own is tensor for own in self._module(other)._parameters.values())]

    @cached_property
    def _owners(self) -> dict[int, dict[str, None]]:
        """Which modules had each parameter at first; those that come later are of one module alone."""
        owners: dict[int, dict[str, None]] = {}
        for name, module in self.model.named_modules():
            for tensor in module._parameters.values():
                owners.setdefault(id(tensor), {})[name] = None
        return owners

    def _edit(self, name: str, parameter: str) -> Tensor:
        """The data of a parameter, about to be changed in place."""
        tensor = self._module(name)._parameters[parameter]
        if tensor is None:
            raise ModelError(f"{name} has no {parameter}")
        if others := self._others(name, parameter):
            raise ModelError(f"{name}.{parameter} is tied to {', '.join(others)}, so it cannot be changed alone")
        if (name, parameter) not in self._before:  # what was untied or added here is dropped as a whole
            self._before[name, parameter] = tensor, tensor.detach().clone()
        return tensor.data

    def _multiply(self, name: str, parameter: str, axis: int, factors: Tensor) -> None:
        shape = [1] * self._module(name).get_parameter(parameter).dim()
        shape[axis] = -1
        self._multiply_by(name, parameter, factors.reshape(shape))

    def _multiply_by(self, name: str, parameter: str, factors: Tensor) -> None:
        data = self._edit(name, parameter)
        wide = torch.promote_types(data.dtype, torch.float32)
        data.copy_(data.to(wide) * factors.to(data.device, wide))

    def _bias(self, name: str, slot: Slot) -> Tensor:
        """The data of a bias, about to be changed in place; of zeros where there was none."""
        module, bias = self._module(name), str(slot.bias)
        if module._parameters.get(bias) is None:
            self._before.setdefault((name, bias), (None, None))
            weight = module.get_parameter(slot.parameter)
            module._parameters[bias] = nn.Parameter(weight.new_zeros(weight.shape[slot.rows]), requires_grad=False)
        return self._edit(name, bias)
