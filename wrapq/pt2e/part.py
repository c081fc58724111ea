"""A part of a model in the hands of PT2E: exported, prepared, calibrated in place, converted."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from wrapq.errors import CalibrationError, LifecycleError, ModelError, first_line
from wrapq.foreign import quiet
from wrapq.pt2e.base import GraphQuantizer
from wrapq.runtime.graph_program import GraphProgram, describe_graph
from wrapq.runtime.stand_in import combined_class, shadow
from wrapq.wrappers.base import QuantModuleBase, Wrapper
from wrapq.wrappers.quantizer import Quantizer, State

_OBSERVER, _LOUD = "activation_post_process_", "torch.export"
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, OrderedDict))


class Prepared(NamedTuple):
    """What `prepare_pt2e` made of a module: the graph with its observers, and the names of the arguments it takes."""

    graph: fx.GraphModule
    takes: tuple[str, ...]


class Called(nn.Module):
    """A module as a function of some of its arguments, in order, those after the first `positional` by name; hooks that
    change what comes to it are part of it."""

    def __init__(self, part: nn.Module, takes: Sequence[str], positional: int) -> None:
        super().__init__()
        self.part, self.takes, self.positional = part, tuple(takes), positional

    def forward(self, *args: Tensor) -> Any:
        named = dict(zip(self.takes[self.positional :], args[self.positional :], strict=True))
        return self.part(*args[: self.positional], **named)


def prepare_part(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], quantizer: GraphQuantizer
) -> Prepared:
    """The graph of `module`, called once with `args` and `kwargs`, with the observers that `quantizer` asks for.

    Which sizes of the arguments may change is what tracing leaves open; one of 1 stays 1, but for the first axis.

    Raises:
        CalibrationError: it cannot be traced, is called with more than tensors, or has nothing for the quantizer.
    """
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given = {name: value for name, value in given.items() if value is not None}
    if other := [name for name, value in given.items() if not isinstance(value, Tensor)]:
        what = f"it is called with {other[0]}, which is no tensor, and PT2E is given what makes a tensor of tensors"
        raise CalibrationError(what)
    takes, example = tuple(given), [value.detach() for value in given.values()]
    if all(value.dim() and value.shape[0] == 1 for value in example):  # a batch of one, which tracing takes for fixed
        example = [torch.cat([value, value]) for value in example]
    axes = tuple((torch.export.Dim.AUTO,) * value.dim() for value in example)
    with quiet(_LOUD), torch.no_grad():
        try:
            called = Called(module, takes, sum(a is b for a, b in zip(args, given.values(), strict=False)))
            traced = torch.export.export(called, tuple(example), dynamic_shapes=(axes,)).module()
            describe_graph(traced, takes, takes)  # which says before anything is calibrated that it cannot be kept
            graph = prepare_pt2e(traced, quantizer.make())
        except ModelError as error:
            raise CalibrationError(str(error)) from error
        except Exception as error:  # of what the tracer met in somebody else's code, there is no list
            raise CalibrationError(f"PT2E does not take it: {first_line(error)}") from error
    if not any(node.op == "call_module" and str(node.target).startswith(_OBSERVER) for node in graph.graph.nodes):
        raise CalibrationError(f"{type(quantizer).__name__} finds nothing in it that it quantizes")
    return Prepared(graph, takes)


def convert_part(module: nn.Module, prepared: Prepared) -> GraphProgram:
    """What runs in the place of `module` once the observers of `prepared` have seen data."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with quiet(_LOUD), torch.no_grad():
        converted = convert_pt2e(prepared.graph)
    return GraphProgram(*describe_graph(converted, tuple(inspect.signature(module.forward).parameters), prepared.takes))


@dataclass
class Held:
    """What stands behind a part, none of which is a child of it."""

    quantizer: GraphQuantizer
    prepared: Prepared | None = None
    program: GraphProgram | None = None


class PartPoint(Quantizer):
    """The one point of a part: all that PT2E quantizes there, which is in force or not as a whole."""

    def __init__(self, quantizer: GraphQuantizer, where: str) -> None:
        super().__init__(cast(Any, f"PT2E {type(quantizer).__name__}"), where)
        self.held, self.state = Held(quantizer), State.OBSERVING

    def check(self) -> None:
        if self.held.program is None:
            raise LifecycleError(f"{self.where.removesuffix('.part')}: no calibration data came to it")

    def freeze(self) -> None:
        self.check()


class GraphPart(QuantModuleBase):
    """The stand-in for a part: float while it observes, and what PT2E made of it from `finish` on."""

    @classmethod
    def of(cls, module: nn.Module, quantizer: GraphQuantizer, name: str) -> GraphPart:
        """One for the float `module` called `name`, which is not changed and whose hooks stay its own."""
        new = shadow(module, combined_class("Part", cls, type(module)))
        new.__dict__ |= {hooks: OrderedDict() for hooks in _HOOKS}
        new.__dict__["original"], new.__dict__["wrapper"] = module, Wrapper
        new.quantizers = nn.ModuleDict({"part": PartPoint(quantizer, f"{name}.part")})
        return cast(GraphPart, new)

    @property
    def point(self) -> PartPoint:
        """Its point."""
        return cast(PartPoint, self.quantizers["part"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held = self.point.held
        if held.program is not None:
            return (held.program if self.point.enabled else self.original)(*args, **kwargs)
        if held.prepared is None:
            try:
                held.prepared = prepare_part(self.original, args, kwargs, held.quantizer)
            except CalibrationError as error:
                raise CalibrationError(f"{self.point.where.removesuffix('.part')}: {error}") from error
        given = inspect.signature(self.original.forward).bind(*args, **kwargs).arguments
        return held.prepared.graph(*(given[name] for name in held.prepared.takes))

    def finish(self) -> None:
        """Quantize with what was observed from here on; raises `LifecycleError` where nothing was."""
        held = self.point.held
        if held.prepared is not None:
            held.program, held.prepared = convert_part(self.original, held.prepared), None
            self.point.state = State.QUANTIZED
        self.point.check()

    def converted(self, tied: object = None) -> Any:
        self.point.check()
        return self.point.held.program
