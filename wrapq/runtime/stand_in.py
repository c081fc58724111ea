"""The shallow copy by which modules change their class.

A quantized stand-in is a shallow copy of the module it stands for: another object with the same children, parameters
and attributes, whose class puts a forward of ours in front of the original class. Names in the model do not change,
`isinstance` still holds, and the original is left as it was, so that undoing is putting it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

_CONTAINERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_CLASSES: dict[tuple[str, tuple[type, ...], type | None], type] = {}
_ORIGINALS: dict[type, type] = {}
_KEYS: dict[type, tuple[str, tuple[type, ...], type | None]] = {}


def combined_class(prefix: str, *bases: type, beneath: type | None = None) -> type:
    """The class `prefix + name of the last base`, deriving from `bases` in that order; one for each combination.

    `beneath` derives from one class of torch, and stands right in front of it where the last of `bases` derives from it
    too: what a model's own class makes of a forward of torch's stays, and that forward is another.
    """
    key = (prefix, bases, beneath)
    if key not in _CLASSES:
        *front, original = bases
        if beneath is not None and issubclass(original, beneath.__bases__):
            bases = (*front, beneath) if issubclass(beneath, original) else (*bases, beneath)
        attributes = {"__module__": bases[0].__module__, "__reduce_ex__": _reduce}
        cls = type(f"{prefix}{original.__name__}", bases, attributes)
        _CLASSES[key], _ORIGINALS[cls], _KEYS[cls] = cls, original, key
    return _CLASSES[key]


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """A class that is made at run time is found by what it was made of: so a whole model can be pickled."""
    state = cast(tuple[Any, ...], object.__reduce_ex__(self, 2))[2:]
    return _blank, _KEYS[type(self)], *state


def _blank(prefix: str, bases: tuple[type, ...], beneath: type | None) -> nn.Module:
    return cast(nn.Module, object.__new__(combined_class(prefix, *bases, beneath=beneath)))


def original_class(module: nn.Module) -> type:
    """The class that `module` has, or had before one of ours was put in front of it."""
    return _ORIGINALS.get(type(module), type(module))


def shadow(module: nn.Module, cls: type) -> Any:
    """A shallow copy of `module` with class `cls`: shares tensors and children, has its own tables of them."""
    copy: Any = object.__new__(cls)
    copy.__dict__ = dict(module.__dict__)
    for name in _CONTAINERS:
        copy.__dict__[name] = module.__dict__[name].copy()
    return copy


WITHOUT = "_without_weight"


@contextmanager
def without_weight(module: nn.Module) -> Iterator[None]:
    """While this holds a quantized weight of `module`, if asked for, has its shape and dtype, and no numbers."""
    module.__dict__[WITHOUT] = True
    try:
        yield
    finally:
        del module.__dict__[WITHOUT]
