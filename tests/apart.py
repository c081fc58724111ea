"""A device of its own without a GPU: tensors on `APART` lie on the CPU, but mix with others as little as a GPU's do.

`torch.device("cpu", 0)` is another device than `torch.device("cpu")` to everyone who compares them. Inside `Apart()`,
what is made or moved there is marked, at the memory it lies in; what is computed from it is marked too; and a call that
mixes it with tensors of the CPU is refused, as CUDA refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

APART = torch.device("cpu", 0)
_MAY_MIX = {
    "copy_",
    "to",
    "__get__",
    "__set__",
    "__setitem__",
    "__getitem__",
    "type_as",
    "_has_compatible_shallow_copy_type",
}
_TO_PYTHON = {"numpy", "__array__"}


class Apart(TorchFunctionMode):
    """While it is entered, `APART` is a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return APART if is_apart(args[0]) else func(*args)
        given = list(_tensors((args, kwargs)))
        there = [is_apart(tensor) for tensor in given]
        self._refuse(name, given, there, args, kwargs)
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and given and isinstance(result, Tensor):
            return _moved(result, given[0], name, args[1:], kwargs)
        device = kwargs.get("device")
        if any(there) if device is None else torch.device(device) == APART:
            for tensor in _tensors(result):
                _mark(tensor)
        return result

    @staticmethod
    def _refuse(name: str, given: list[Tensor], there: list[bool], args: Any, kwargs: Any) -> None:
        if not any(there) and kwargs.get("device") != APART:
            return
        if name in _TO_PYTHON:
            raise TypeError(f"{name}: can't convert a tensor of another device to numpy")
        if any(isinstance(leaf, torch.Generator) for leaf in _pytree.tree_leaves((args, kwargs))):
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor of another device")
        # a single number may come from anywhere
        strays = [tuple(t.shape) for t, here in zip(given, there, strict=True) if not here and t.dim()]
        if any(there) and strays and name not in _MAY_MIX:
            raise RuntimeError(f"{name}: tensors of the CPU, of shapes {strays}, beside some of another device")


def is_apart(tensor: Tensor) -> bool:
    """Whether `tensor` lies on `APART`."""
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        return plain and getattr(tensor.untyped_storage(), "apart", False)


def _mark(tensor: Tensor) -> None:
    if tensor.layout == torch.strided and tensor.device.type == "cpu":
        tensor.untyped_storage().apart = True


def _moved(result: Tensor, tensor: Tensor, name: str, args: Any, kwargs: Any) -> Tensor:
    """What `tensor.to(...)` or `tensor.cpu()` gives, in memory of its own where that changes the device."""
    places = [value for value in (*args, *kwargs.values()) if isinstance(value, (torch.device, str, Tensor))]
    place = places[0] if places else None
    here = is_apart(tensor)
    if name == "cpu":
        target = False
    elif place is None:
        target = here
    else:
        target = is_apart(place) if isinstance(place, Tensor) else torch.device(place) == APART
    if target != here and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        result = result.clone()
    if target:
        _mark(result)
    return result


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor))
