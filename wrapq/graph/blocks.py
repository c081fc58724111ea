"""The repeated blocks of a model, and the batches and hidden states that pass through them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from wrapq.graph.towers import find_towers
from wrapq.runtime.module import QuantizedWeight
from wrapq.runtime.stand_in import original_class


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model, as transformers' decoder layers are: `count` of them, in the list whose name is
    `prefix`, such as `model.layers`; none for a model without."""

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

    def positions(self, names: Iterable[str]) -> Iterator[tuple[str, int]]:
        """Each of `names`, which come in the model's order, with the index of its block; -1 before all blocks, their
        count after the first of them."""
        outside = -1
        for name in names:
            index = self.index(name)
            outside = outside if index is None else self.count
            yield name, outside if index is None else index


def find_blocks(model: nn.Module) -> Blocks:
    """The `ModuleList` of equal classes that holds the most parameters, rounded or not, in the language model where
    there is more; wrapped ones count as what they were."""
    best, size, beside = Blocks(), 0, tuple(f"{name}." for name in find_towers(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({original_class(child) for child in module}) != 1:
            continue
        if name.startswith(beside) or "expert" in name.rpartition(".")[2]:  # which run side by side
            continue
        rounded = sum(m.weight_layout.numel() for m in module.modules() if isinstance(m, QuantizedWeight))
        parameters = rounded + sum(p.numel() for p in module.parameters())
        if parameters > size:
            best, size = Blocks(name, len(module)), parameters
    return best


def output_head(model: nn.Module) -> nn.Module | None:
    """What a language model of transformers makes logits with; None for another."""
    try:
        head = cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data: the keyword arguments of the forward, and the mask [B, T] of real tokens."""

    inputs: Mapping[str, Any]
    mask: Tensor | None = None


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward with `use_cache=False`, where `model` has that argument and `inputs` do not set it:
    suspended forwards would hold keys and values that nobody reads, and a block that runs again would read its own."""
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False, **inputs} if has_cache else dict(inputs)


def input_hidden_states(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block: the first, or the one of that name."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def output_hidden_states(output: Any) -> Tensor:
    """The hidden states in the output of a block or a model: its first tensor."""
    if isinstance(output, Mapping):
        return next(value for value in output.values() if isinstance(value, Tensor))
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While this holds each of the modules runs the function given for it as its forward; its hooks stay. An attribute
    of an object hides the method of its class, and removing it brings that back."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own


def giving(output: Any) -> Callable[..., Any]:
    """A forward that gives `output`, whatever comes to it."""
    return lambda *args, **kwargs: output
