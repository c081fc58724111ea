"""How a model uses its modules: which of them a forward calls, and whose weight it reads for itself.

Seen in one forward of a few tokens on the meta device, where weights have no values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wrapq.graph.blocks import Blocks, find_blocks, replaced_forward
from wrapq.graph.dataflow import example_inputs
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.graph.trace import run_operation, standing_in
from wrapq.wrappers.experts import Experts


@dataclass(frozen=True)
class Usage:
    """What a forward did with some modules: those it `called`, and those whose weight it `read` beside calling them."""

    called: frozenset[str]
    read: frozenset[str]


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or {})


def find_usage(model: nn.Module, names: Collection[str], inputs: Mapping[str, Any] | None = None) -> Usage | None:
    """How a float `model` on the meta device uses its modules `names` in a forward with `inputs`, or a few token ids;
    None where no forward is possible without weights.

    One block stands for all that are alike in every part, and the first of the experts of a layer for the others.
    """
    given = example_inputs(model) if inputs is None else inputs
    blocks, alike = find_blocks(model), _find_alike(model)
    layers = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    for likeness in (alike, {}) if alike else (alike,):  # blocks may hand on more than their output
        first = {name: _first(name, blocks, likeness, layers) for name in names}
        if (seen := _run(model, set(first.values()), given, blocks, likeness)) is not None:
            called, read = ({name for name in names if first[name] in found} for found in seen)
            return Usage(frozenset(called), frozenset(read))
    return None


@torch.no_grad()
def find_calls(
    model: nn.Module, names: Collection[str], inputs: Mapping[str, Any] | None = None
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]] | None:
    """With what a float `model`, on the meta device or not, calls its modules `names` first in a forward with `inputs`,
    or a few token ids; None where no forward is possible without weights."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as undo:
        for name in names:
            keep = lambda _, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)) and None  # noqa: E731
            undo.callback(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True).remove)
        undo.enter_context(standing_in(model))
        try:
            with _Operations():
                model(**(example_inputs(model) if inputs is None else inputs))
        except Exception:  # a model may raise anything where weights have no values
            return None
    return calls


def _first(name: str, blocks: Blocks, alike: Mapping[int, int], layers: Collection[str]) -> str:
    """The module that stands for the one called `name`."""
    if (index := blocks.index(name)) in alike:
        name = f"{blocks.prefix}.{alike[cast(int, index)]}{name.removeprefix(f'{blocks.prefix}.{index}')}"
    match = EXPERT_NAME.fullmatch(name)
    return f"{match[1]}.0.{match[2]}" if match and match[1] in layers else name


def _find_alike(model: nn.Module) -> dict[int, int]:
    """For each repeated block that is like an earlier one, that one: the same parts with the same settings, but for
    what says which block it is."""
    found, firsts = dict[int, int](), dict[object, int]()
    for index, name in enumerate(find_blocks(model).names()):
        parts = [
            (inner, type(module), *sorted((k, v) for k, v in vars(module).items() if _is_setting(k, v)))
            for inner, module in model.get_submodule(name).named_modules()
            if (match := EXPERT_NAME.fullmatch(f"{name}.{inner}")) is None
            or f"{name}.{inner}" == f"{match[1]}.0.{match[2]}"
        ]
        first = firsts.setdefault(tuple(parts), index)
        if first != index:
            found[index] = first
    return found


def _is_setting(key: str, value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) and not key.endswith(("idx", "id"))


@torch.no_grad()
def _run(
    model: nn.Module, names: Collection[str], inputs: Mapping[str, Any], blocks: Blocks, alike: Mapping[int, int]
) -> tuple[set[str], set[str]] | None:
    """Those of `names` that a forward calls, and those whose weight it reads beside; None where it fails."""
    called, read, inside = set[str](), set[str](), list[str]()
    outputs: dict[int, Any] = {}

    def own(name: str, module: nn.Module) -> Tensor:
        if name not in inside:
            read.add(name)
        return cast(Tensor, module._parameters["weight"])

    def enter(name: str) -> None:
        called.add(name)
        inside.append(name)

    with ExitStack() as undo:
        undo.enter_context(weights_through(model, names, own))
        for name in names:
            module = model.get_submodule(name)
            undo.callback(module.register_forward_pre_hook(lambda *_, name=name: enter(name)).remove)
            undo.callback(module.register_forward_hook(lambda *_, name=name: inside.remove(name)).remove)
        layers = [model.get_submodule(name) for name in blocks.names()]
        for index in set(alike.values()):
            keep = layers[index].register_forward_hook(lambda *_, index=index: outputs.update({index: _[-1]}))
            undo.callback(keep.remove)
        skips = {layers[index]: lambda *_, first=first, **__: outputs[first] for index, first in alike.items()}
        undo.enter_context(replaced_forward(skips))
        undo.enter_context(standing_in(model))
        try:
            with _Operations():
                model(**inputs)
        except Exception:  # a model may raise anything where weights have no values
            return None
    return called, read


@torch.no_grad()
def find_initialized(model: nn.Module, stored: Mapping[str, torch.dtype | None]) -> set[str]:
    """The layers of a transformers `model` on the meta device whose weights it fails to initialize while they are not
    floats: as it loads a checkpoint, it does so with every module, also with those that it fills.

    Args:
        model: of no use afterwards.
        stored: the layers that are not floats yet, and which dtype their `weight` has; None where there is none.
    """
    found, asked = set[str](), list[str]()
    floats = {name: cast(Tensor, model.get_submodule(name)._parameters.pop("weight")) for name in stored}
    others = {name: floats[name].to(dtype) for name, dtype in stored.items() if dtype is not None}

    def own(name: str, module: nn.Module) -> Tensor:
        asked.append(name)
        weight = floats[name] if name in found else others.get(name)
        if weight is None:
            raise AttributeError("weight")
        return weight

    for tensor in (*model.parameters(), *floats.values(), *others.values()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined] # the sign of those that it leaves alone
    with weights_through(model, stored, own):
        owners = dict[str, Any]()
        for name, module in model.named_modules():
            outer = owners.get(name.rpartition(".")[0])
            owners[name] = getattr(module, "_init_weights", outer)
            while True:
                asked.clear()
                try:
                    owners[name](module)
                except Exception:  # a model may raise anything where weights have no values
                    if asked and asked[-1] not in found:
                        found.add(asked[-1])
                        continue
                break
    return found


@contextmanager
def weights_through(
    model: nn.Module, names: Collection[str], get: Callable[[str, nn.Module], Tensor]
) -> Iterator[None]:
    """While this holds, who asks one of the modules `names` of `model` for its `weight` gets what `get` returns for its
    name and itself."""
    known = {id(model.get_submodule(name)): name for name in names}
    weight = property(lambda module: get(known[id(module)], module))
    classes: dict[type, type] = {}
    with ExitStack() as undo:
        for module in [model.get_submodule(name) for name in names]:
            cls = type(module)
            if cls not in classes:
                own = {"weight": weight, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
                classes[cls] = type(cls.__name__, (cls,), own)
            undo.callback(setattr, module, "__class__", cls)
            module.__class__ = classes[cls]
        yield
