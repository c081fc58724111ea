"""Tied parameters: tensors that several modules hold, such as an embedding and the head of a language model."""

from __future__ import annotations

from torch import nn


def tied_parameters(model: nn.Module) -> list[list[tuple[str, str]]]:
    """For each parameter that is held more than once, the names of the module and of its parameter at each place."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is not None:
                places.setdefault(id(tensor), []).append((name, parameter))
    return [tied for tied in places.values() if len(tied) > 1]


def tied_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module that shares one of its parameters, the others that hold it."""
    tied: dict[str, dict[str, None]] = {}
    for places in tied_parameters(model):
        names = [name for name, _ in places]
        for name in names:
            tied.setdefault(name, {}).update((other, None) for other in names if other != name)
    return {name: tuple(others) for name, others in tied.items()}
