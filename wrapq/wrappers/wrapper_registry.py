"""Which wrapper stands in for which module."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from wrapq.registry import Registry
from wrapq.wrappers.base import Wrapper


class WrapperRegistry(Registry[type[Wrapper]]):
    """Wrappers by the full name of the class they stand in for, so that registering one imports nothing.

    A module is wrapped when its class or a base of it is registered; when its forward is to the letter the forward of a
    registered class, as transformers' families share theirs; or when a wrapper's static `matches(module)` says so. A
    wrapper that replaces the original forward instead of calling it says `replaces_forward = True`, and then stands in
    for a subclass only if that did not override forward.
    """

    def find(self, module: nn.Module) -> type[Wrapper] | None:
        """The wrapper for `module`, or None."""
        if isinstance(module, torch.jit.ScriptModule):  # whose class has no forward to ask for
            return None
        self._load()
        cls: type = type(module)
        for base in cls.__mro__:
            wrapper = self._entries.get(_path(base))
            if wrapper and (not wrapper.replaces_forward or _forward(base) is _forward(cls)):
                return wrapper
        if "transformers" in sys.modules and (own := _forward_source(cls)) is not None:
            for name, wrapper in self._entries.items():
                if wrapper.replaces_forward and _forward_source(_class_at(name)) == own:
                    return wrapper
        return next((w for w in self._entries.values() if w.matches is not None and w.matches(module)), None)

    @staticmethod
    def normalize(name: str) -> str:
        """Class names are case sensitive."""
        return name


WRAPPERS = WrapperRegistry("wrapper", "wrapq.wrappers")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _forward(cls: type) -> Callable[..., object]:
    return getattr(cls, "forward")  # noqa: B009 - not every type has one, but those asked for do


@cache
def _class_at(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


@cache
def _forward_source(cls: type | None) -> str | None:
    """What the class's own forward says, without comments, annotations and decorators; None where it has none."""
    if cls is None or "forward" not in vars(cls):
        return None
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(_forward(cls))))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
    names = [arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)]
    return "\n".join([" ".join(names), *(ast.unparse(statement) for statement in function.body)])
