"""A module that is a graph of torch's operators: what is left of one that PT2E quantized, without torchao's classes.

The graph is plain data, which goes into a manifest, and its tensors are buffers, which go where a model's tensors go.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from wrapq.errors import ModelError

_OPERATORS = ("aten", "quantized_decomposed", "torchao")
"""The namespaces of `torch.ops` that a graph may call."""
_FUNCTIONS = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
"""What of the module `operator` is done with sizes that stay open."""
_WORDS = (torch.dtype, torch.memory_format, torch.layout)


class GraphProgram(nn.Module):
    """A graph with its tensors, as one module.

    Attributes:
        description: the graph as plain data: `parameters`, the names of what the module is called with, in order;
            `takes`, those of them that the graph reads; `sizes`, of each of these the sizes of its axes, None where it
            is open; `nodes`, each with its name, operator and arguments; `tensors`, each with its dtype and shape.
    """

    def __init__(self, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Build what `description` says, with its tensors, or with none of their numbers: on the meta device.

        Raises:
            ModelError: the description is none of a graph, or calls what it may not.
        """
        super().__init__()
        self.description = dict(description)
        _register_operators()
        try:
            holder, graph = nn.Module(), fx.Graph()
            for name, (dtype, shape) in description["tensors"].items():
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta") if tensors is None else None
                holder.register_buffer(name, tensors[name] if tensors is not None else tensor)
            made: dict[str, fx.Node] = {}
            for name, kind, target, arguments, options in description["nodes"]:
                found = _function(target) if kind == "call_function" else target
                given = _decoded(arguments, made), _decoded(options, made)
                made[name] = graph.create_node(kind, found, tuple(given[0]), given[1], name)
            self.graph = fx.GraphModule(holder, graph)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"a graph that PT2E left cannot be built: {error}") from error

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the graph gives for the arguments that the module was traced with; raises `ModelError` for others."""
        given = dict(zip(self.description["parameters"], args, strict=False)) | kwargs
        takes = self.description["takes"]
        if set(takes) - given.keys() or any(x is not None for name, x in given.items() if name not in takes):
            raise ModelError(f"this module was traced with {', '.join(takes)}, and is called with {', '.join(given)}")
        for name, sizes in zip(takes, self.description["sizes"], strict=True):
            shape = given[name].shape
            if len(shape) != len(sizes) or any(s is not None and s != n for s, n in zip(sizes, shape, strict=True)):
                raise ModelError(f"{name} is {tuple(shape)}, and was traced as {sizes}, None being open")
        return self.graph(*(given[name] for name in takes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphProgram:
        def moved(tensor: Tensor) -> Tensor:  # its operators are those of the dtypes that it was traced in
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved, recurse)


def describe_graph(
    traced: fx.GraphModule, parameters: Sequence[str], takes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a graph that `torch.export` traced, and its tensors; see `GraphProgram`.

    Raises:
        ModelError: the graph gives more than one tensor, or something in it is no operator of torch.
    """
    tensors: dict[str, Tensor] = {}
    nodes: list[list[Any]] = []
    for node in traced.graph.nodes:
        target: Any = str(node.target)
        if node.op == "get_attr":
            if not node.users:
                continue
            path, _, key = target.rpartition(".")
            target = target.replace(".", "_")
            tensors[target] = getattr(traced.get_submodule(path), key).detach()
        elif node.op == "call_module":
            if node.users:
                raise ModelError(f"PT2E left the module {target} in the graph")
            continue  # a check of sizes, which `forward` does
        elif node.op == "call_function":
            target = _name_of(node.target)
        nodes.append([node.name, node.op, target, _encoded(node.args), _encoded(node.kwargs)])
    (given,) = nodes[-1][3]
    if not isinstance(given, dict):
        if len(given) != 1:
            raise ModelError("it gives more than one tensor, and PT2E is given what makes one of others")
        nodes[-1][3] = given
    sizes = [
        [size if isinstance(size, int) else size.node.maybe_as_int() for size in node.meta["val"].shape]
        for node in traced.graph.nodes
        if node.op == "placeholder"
    ]
    kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    described = {"parameters": [*parameters], "takes": [*takes], "sizes": sizes, "nodes": nodes, "tensors": kinds}
    return described, tensors


def _register_operators() -> None:
    try:
        import torchao  # noqa: F401 - which registers the operators
    except ImportError:
        raise ModelError("a part that PT2E quantized needs torchao: pip install 'wrapq[pt2e]'") from None


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _OPERATORS:
        return str(target)
    if (name := getattr(target, "__name__", "")) in _FUNCTIONS and getattr(operator, name) is target:
        return f"operator.{name}"
    raise ModelError(f"{target} is no operator that a saved graph may call")


def _function(name: str) -> Any:
    space, _, rest = name.partition(".")
    if space == "operator" and rest in _FUNCTIONS:
        return getattr(operator, rest)
    packet, _, overload = rest.rpartition(".")
    if space not in _OPERATORS or not packet.isidentifier() or not overload.isidentifier():
        raise ValueError(f"{name} is no operator that a saved graph may call")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _encoded(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_encoded(each) for each in value]
        case fx.Node():
            return {"node": value.name}
        case torch.device():
            return {"device": str(value)}
        case dict():
            return {"options": {key: _encoded(each) for key, each in value.items()}}
        case _ if isinstance(value, _WORDS):
            return {"torch": str(value).removeprefix("torch.")}
    raise ModelError(f"{value!r} in a graph is nothing that can be saved")


def _decoded(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, made) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, word),) = value.items()
    match kind:
        case "node":
            return made[word]
        case "device":
            return torch.device(word)
        case "options":
            return {key: _decoded(each, made) for key, each in word.items()}
        case "torch" if isinstance(found := getattr(torch, word), _WORDS):
            return found
    raise ValueError(f"{value} is no argument of an operator")
