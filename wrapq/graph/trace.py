"""Tracing the channels of activations through one forward of a model.

The model runs once on a few tokens, on the meta device or not. Each activation carries a *channel tag*: an integer
tensor of the same shape with the number of the output channel that each element is. Operations that only move elements
(views, heads, fused projections split in two, repeated key heads) run on the tag itself, so that they need no rule per
operation or family; a few operations that keep channels apart have a rule; any other operation marks its input channels
unsafe: they have a consumer that cannot be rescaled.

Which expert of a mixture a token goes to depends on data: where experts are modules, the first of a layer takes all
tokens and stands for the others (`wrapq.graph.mixtures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wrapq.errors import ModelError
from wrapq.graph.blocks import replaced_forward
from wrapq.graph.layers import LayerInfo, along, layer_info
from wrapq.wrappers.experts import Experts

_COPIES = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy"})
_RESHAPES = frozenset({"reshape", "_reshape_alias", "_unsafe_view", "view"})
_MOVES = _COPIES | _RESHAPES | {
    "cat", "constant_pad_nd", "expand", "flip", "index", "index_select", "narrow", "permute", "repeat",
    "repeat_interleave", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose",
    "unbind", "unfold", "unsafe_split", "unsqueeze",
}  # fmt: skip
_SHAPE_ONLY = {
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like",
}  # fmt: skip
_DEPENDS = "the forward depends on the value of an activation, which has none before weights are loaded"
_UNTRACED = -1
_IMAGE_RANK = 4  # [B, C, H, W], whose channels are not the last axis


class ChannelTag(NamedTuple):
    """The channels that the elements of a tensor belong to.

    Attributes:
        ids: int64, of the tensor's shape: the number of the channel; -1 for untraced elements.
        ops: the operations between the producer and here: `attention` (tokens were mixed), `product` (an elementwise
            product with another tensor), `gain` (each token was multiplied by one number), `positive` (a function that
            commutes with positive factors only).
    """

    ids: Tensor
    ops: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Producer:
    """A layer, or a sum of traced tensors, whose output channels are numbered from `base`; `layer` is None for sums."""

    name: str
    layer: LayerInfo | None
    base: int
    width: int

    @property
    def ids(self) -> Tensor:
        """The numbers of its channels."""
        return torch.arange(self.base, self.base + self.width)


@dataclass(frozen=True)
class LayerInput:
    """The traced input of a layer: `ids` [K], the number of each of its channels, and the `ops` before it."""

    name: str
    layer: LayerInfo
    ids: Tensor
    ops: frozenset[str]


@dataclass(frozen=True)
class TracedSum:
    """A sum of two traced tensors: the channels of `producer` are those of `left` [N] plus those of `right` [N]."""

    producer: Producer
    left: Tensor
    right: Tensor
    ops: frozenset[str]


@dataclass
class Trace:
    """The result of one traced forward.

    Attributes:
        producers: by name, in the order in which they ran.
        inputs: of layers that consume traced channels, by the layer's name.
        unsafe: channel numbers that an operation sees which cannot be rescaled, and the operation.
        shared: the linears that read one tensor, in order, for each such tensor, by its identity.
        heads: for each product with attention weights the channels of each head of the values [H, D].
        count: how many channels are numbered.
    """

    producers: dict[str, Producer] = field(default_factory=dict)
    inputs: dict[str, LayerInput] = field(default_factory=dict)
    sums: list[TracedSum] = field(default_factory=list)
    unsafe: list[tuple[Tensor, str]] = field(default_factory=list)
    shared: dict[int, list[str]] = field(default_factory=dict)
    heads: list[Tensor] = field(default_factory=list)
    count: int = 0

    def producers_of(self, ids: Tensor) -> list[str]:
        """The names of the producers that have channels among `ids`, in the order in which they ran."""
        names, bases = self._bases
        places = torch.bucketize(ids[ids != _UNTRACED], bases, right=True) - 1
        return [names[place] for place in places.unique().tolist()]

    @cached_property
    def _bases(self) -> tuple[list[str], Tensor]:
        """The names of all producers and their first channels, when the forward has ended."""
        return list(self.producers), torch.tensor([producer.base for producer in self.producers.values()])


@torch.no_grad()
def trace(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> Trace:
    """Run a float `model`, not wrapped, once with `inputs` of at least two tokens, and trace its channels. On the meta
    device all that does not come from weights still runs; a forward that asks for the value of an activation, which
    has none there, raises `ModelError`."""
    tracer = ChannelTracer()
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with tracer.attached_to(model), tracer:
        outputs = model(*args, **kwargs)
    for tensor in tree_leaves(outputs if isinstance(outputs, (Tensor, tuple, list)) else dict(outputs)):
        tracer.mark_unsafe(tensor, "the model's output")
    return tracer.trace


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """While this holds, what in `model` depends on data is replaced by what does not: of experts that are modules the
    first takes all tokens, others return an empty output."""
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, Experts):
                stand_in = module.stand_in
                undo.enter_context(replaced_forward({module: lambda x, *_, go=stand_in, **__: go(x)}))
            elif (layer := layer_info(module)) is not None and layer.opaque:
                undo.enter_context(replaced_forward({module: lambda x, *_, **__: torch.empty_like(x)}))
        yield


class ChannelTracer(TorchDispatchMode):
    """Propagates channel tags through every operation of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._tags: dict[int, ChannelTag] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the identity of a tagged one
        self._inside = 0

    @contextmanager
    def attached_to(self, model: nn.Module) -> Iterator[None]:
        """While this holds, layers of `model` are one operation each."""
        with standing_in(model), ExitStack() as undo:
            for name, module in model.named_modules():
                if (layer := layer_info(module)) is None:
                    continue
                undo.callback(module.register_forward_pre_hook(partial(self._enter_layer, name, layer)).remove)
                undo.callback(module.register_forward_hook(partial(self._leave_layer, name, layer)).remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = run_operation(func, args, kwargs)
        if not self._inside:
            tagged = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self._tags]
            if tagged:
                self._propagate(func, args, kwargs, out, tagged)
        return out

    def mark_unsafe(self, tensor: Any, operation: str) -> None:
        """Note that `operation`, which cannot be rescaled, sees the channels of `tensor`."""
        if (tag := self._tags.get(id(tensor))) is not None:
            self.trace.unsafe.append((_traced(tag.ids), operation))

    def _tag(self, tensor: Tensor, ids: Tensor, ops: frozenset[str] = frozenset()) -> None:
        self._tags.pop(id(tensor), None)
        if bool((ids != _UNTRACED).any()):
            self._tags[id(tensor)] = ChannelTag(ids.reshape(tensor.shape), ops)
            self._alive.append(tensor)

    def _new_producer(self, name: str, layer: LayerInfo | None, width: int) -> Producer:
        if name not in self.trace.producers:
            self.trace.producers[name] = Producer(name, layer, self.trace.count, width)
            self.trace.count += width
        return self.trace.producers[name]

    def _enter_layer(self, name: str, layer: LayerInfo, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside += 1
        if args and layer.kind == "linear":
            self._alive.append(args[0])
            self.trace.shared.setdefault(id(args[0]), []).append(name)
        if not args or (tag := self._tags.get(id(args[0]))) is None:
            return
        if layer.kind == "norm":
            ids = _traced(tag.ids)
        else:
            by_channel = layer.consumes is not None or layer.kind == "batch_norm"
            channels = _channels(tag.ids, layer.channel_axis) if by_channel else None
            if channels is None:
                self.mark_unsafe(args[0], f"{name} ({type(module).__name__})")
                return
            ids = channels
        before = self.trace.inputs.setdefault(name, LayerInput(name, layer, ids, tag.ops))
        if not torch.equal(before.ids, ids):
            self.trace.unsafe += [(_traced(seen), f"{name}, which runs more than once") for seen in (before.ids, ids)]

    def _leave_layer(self, name: str, layer: LayerInfo, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if layer.produces is not None and isinstance(output, Tensor):
            ids = self._new_producer(name, layer, output.shape[layer.channel_axis]).ids
            self._tag(output, along(ids, layer.channel_axis, output.dim()).expand(output.shape))

    def _propagate(self, func: Any, args: Any, kwargs: Any, out: Any, tagged: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name in _SHAPE_ONLY:
            return
        if name in _MOVES:
            done = self._move(func, name, args, kwargs, out)
        elif "scaled_dot_product" in name:
            done = self._mix(args[:2], args[2], tree_leaves(out)[0])
        else:
            done = name in _RULES and _RULES[name](self, args, out)
        if not done:
            for tensor in tagged:
                self.mark_unsafe(tensor, name)
            for tensor in tree_leaves(out):
                self._tags.pop(id(tensor), None)

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        if any(isinstance(t, Tensor) and t.is_meta and not t.is_floating_point() for t in tree_leaves(args)):
            return False  # an index that is not known
        ops = frozenset[str]().union(*(self._tags[id(t)].ops for t in tree_leaves(args) if id(t) in self._tags))
        ids = tree_map(self._ids, args)
        if name in _COPIES:
            moved = ids[0]
        elif name in _RESHAPES:
            moved = ids[0].reshape(out.shape)
        elif name == "constant_pad_nd":
            moved = func(*ids[:2], _UNTRACED)
        else:
            moved = func(*ids, **tree_map(self._ids, kwargs))
        for tensor, moved_ids in zip(tree_leaves(out), tree_leaves(moved), strict=True):
            self._tag(tensor, moved_ids.contiguous(), ops)
        return True

    def _ids(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._tags:
            return self._tags[id(value)].ids
        if value.is_floating_point():
            return torch.full(value.shape, _UNTRACED)
        return value.cpu()

    def _scaled(self, args: Any, out: Tensor) -> bool:
        """`x * y` keeps the channels of one of them, of which the other is the scale."""
        sides = [(t, self._tags[id(t)]) for t in args[:2] if isinstance(t, Tensor) and id(t) in self._tags]
        (tensor, tag), others = sides[-1], sides[:-1]
        for other, _ in others:
            self.mark_unsafe(other, "a product")
        by = args[1] if tensor is args[0] else args[0]
        if not isinstance(by, Tensor) or by.numel() == 1:
            ops = tag.ops
        else:
            per_token = by.shape[-1] == 1 and out.dim() < _IMAGE_RANK
            ops = tag.ops | {"gain" if per_token else "product"}
        self._tag(out, tag.ids.expand(out.shape), ops)
        return True

    def _divided(self, args: Any, out: Tensor) -> bool:
        return not (isinstance(args[1], Tensor) and id(args[1]) in self._tags) and self._scaled(args, out)

    def _same(self, args: Any, out: Tensor, *ops: str) -> bool:
        tag = self._tags[id(args[0])]
        self._tag(out, tag.ids, tag.ops.union(ops))
        return True

    def _clipped(self, args: Any, out: Tensor) -> bool:
        """No factor commutes with a limit, as that of a ReLU6; traced on, so that messages name the consumers."""
        self.mark_unsafe(args[0], "a function that clips at a constant, as ReLU6 does")
        return self._same(args, out)

    def _pooled(self, args: Any, out: Any) -> bool:
        first = tree_leaves(out)[0]
        tag = self._tags[id(args[0])]
        if (channels := _channels(tag.ids, 1)) is None:
            return False
        self._tag(first, along(channels, 1, first.dim()).expand(first.shape), tag.ops | {"positive"})
        return True

    def _averaged(self, args: Any, out: Tensor) -> bool:
        tag = self._tags[id(args[0])]
        if len(args) < 2 or not args[1]:
            return False
        low, high = tag.ids.amin(args[1], keepdim=True), tag.ids.amax(args[1], keepdim=True)
        if not torch.equal(low, high):
            return False
        self._tag(out, low, tag.ops | {"attention"})
        return True

    def _added(self, args: Any, out: Tensor) -> bool:
        left, right = (self._tags.get(id(t)) for t in args[:2])
        if left is None or right is None:
            return False
        pairs = torch.stack([left.ids.expand(out.shape), right.ids.expand(out.shape)]).flatten(1)
        key, inverse = (pairs[0] * (self.trace.count + 1) + pairs[1]).unique(return_inverse=True)
        first = torch.empty_like(key).scatter_(0, inverse, torch.arange(len(inverse)))
        producer = self._new_producer(f"+{len(self.trace.sums)}", None, len(key))
        self.trace.sums.append(TracedSum(producer, pairs[0][first], pairs[1][first], left.ops | right.ops))
        self._tag(out, producer.base + inverse)
        return True

    def _mix(self, scores: Sequence[Tensor], values: Tensor, out: Tensor) -> bool:
        """A product with `values` [X, S, D] keeps the channels that all their rows S share, as attention does."""
        tag = self._tags.get(id(values))
        if tag is None or not torch.equal(tag.ids.amin(-2), tag.ids.amax(-2)):
            return False
        for tensor in scores:
            self.mark_unsafe(tensor, "attention scores")
        ids = tag.ids[..., :1, :]
        self.trace.heads.append(ids.reshape(-1, ids.shape[-1]).unique(dim=0))
        if ids.dim() == 4 and ids.shape[1] != out.shape[1]:
            ids = ids.repeat_interleave(out.shape[1] // ids.shape[1], 1)
        self._tag(out, ids.expand(out.shape), tag.ops | {"attention"})
        return True


_RULES: dict[str, Callable[[ChannelTracer, Any, Any], bool]] = {
    **dict.fromkeys(("mul", "mul_"), ChannelTracer._scaled),
    **dict.fromkeys(("div", "div_"), ChannelTracer._divided),
    **dict.fromkeys(("neg", "native_dropout", "dropout"), ChannelTracer._same),
    **dict.fromkeys(
        ("relu", "relu_", "leaky_relu", "leaky_relu_"), lambda tracer, *given: tracer._same(*given, "positive")
    ),
    **dict.fromkeys(("hardtanh", "hardtanh_"), ChannelTracer._clipped),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices"), ChannelTracer._pooled
    ),
    **dict.fromkeys(("mean", "sum"), ChannelTracer._averaged),
    **dict.fromkeys(("add", "add_"), ChannelTracer._added),
    "bmm": lambda tracer, args, out: tracer._mix(args[:1], args[1], out),
}


def _traced(ids: Tensor) -> Tensor:
    ids = ids.unique()
    return ids[ids != _UNTRACED]


def _channels(ids: Tensor, axis: int) -> Tensor | None:
    """The channel at each index of `axis`, where it is the same everywhere else; None where it is not."""
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    return rows[0] if bool((rows == rows[0]).all()) else None


def run_operation(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; operations without weights on the meta device run for real, such as masks and positions."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    meta = [t for t in tensors if t.is_meta]
    if not meta and str(kwargs.get("device")) == "meta":
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif meta and len(meta) < len(tensors):
        args, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    if meta and func.overloadpacket.__name__ == "_local_scalar_dense":
        raise ModelError(_DEPENDS)
    try:
        return func(*args, **kwargs)
    except NotImplementedError as error:  # such as the places of what is not zero
        raise ModelError(_DEPENDS) from error
