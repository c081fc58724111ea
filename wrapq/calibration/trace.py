"""Following the channels of activations through one forward of a model.

The model runs once on a few tokens, on the meta device or not. Beside each activation goes a *mark*: an integer tensor
of the same shape that says for each element which channel of which module's output it is. Operations that only move
elements (views, heads, fused projections split in two, repeated key heads) are applied to the mark as they are, so that
no rule per operation or family is needed for them; a few operations that keep channels apart are known; all others let
the channels they read *escape*: somebody else sees them, so nobody may change them.

Which expert of a mixture a token comes to depends on data: where experts are modules, the first of a layer takes all
tokens, and what is found of it holds for the others (see `wrapq.calibration.mixtures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wrapq.calibration.slots import Leaf, find_leaf
from wrapq.errors import ModelError
from wrapq.wrappers.experts import Experts

_COPIES = frozenset({"alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy"})
_RESHAPES = frozenset({"reshape", "_reshape_alias", "_unsafe_view", "view"})
_MOVES = _COPIES | _RESHAPES | {
    "cat", "constant_pad_nd", "expand", "flip", "index", "index_select", "narrow", "permute", "repeat",
    "repeat_interleave", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose",
    "unbind", "unfold", "unsafe_split", "unsqueeze",
}  # fmt: skip
_SHAPE_ONLY = frozenset({"empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros"})
_SHAPE_ONLY |= {"ones_like", "zeros_like"}
_POSITIVE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_"})
_POOLS = frozenset({"avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices"})
_MEANS = frozenset({"mean", "sum"})
_NOBODY = -1
_IMAGE_RANK = 4  # [B, C, H, W], whose channels are not the last axis


class Mark(NamedTuple):
    """What a tensor's elements are.

    Attributes:
        ids: int64, of the tensor's shape: the number of the channel; -1 for what is not followed.
        path: what happened to it since a module gave it: `attention` (tokens were mixed), `product` (it was multiplied
            with something), `gain` (each token was multiplied with one number), `positive` (a function that only
            positive factors pass).
    """

    ids: Tensor
    path: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Source:
    """A module whose output is followed, or a sum of followed tensors: its channels are numbered from `base`."""

    name: str
    leaf: Leaf | None
    base: int
    width: int

    @property
    def ids(self) -> Tensor:
        """The numbers of its channels."""
        return torch.arange(self.base, self.base + self.width)


@dataclass(frozen=True)
class Read:
    """A leaf that reads followed channels: `ids` [K], one for each channel of its input."""

    name: str
    leaf: Leaf
    ids: Tensor
    path: frozenset[str]


@dataclass(frozen=True)
class Sum:
    """A sum of two followed tensors: the channels of `source` are those `left` [N] plus those `right` [N]."""

    source: Source
    left: Tensor
    right: Tensor
    path: frozenset[str]


@dataclass
class Trace:
    """What one forward showed: who makes channels, who reads them, and which of them somebody else sees.

    Attributes:
        heads: for each product with attention weights the channels of each head of the values [H, D].
    """

    sources: dict[str, Source] = field(default_factory=dict)
    reads: dict[str, Read] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    escapes: list[tuple[Tensor, str]] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    count: int = 0

    def made_by(self, ids: Tensor) -> list[str]:
        """The names of the sources whose channels are among `ids`, in the order in which they ran."""
        bases = torch.tensor([source.base for source in self.sources.values()])
        places = torch.bucketize(ids[ids != _NOBODY], bases, right=True) - 1
        names = list(self.sources)
        return [names[place] for place in places.unique().tolist()]


@torch.no_grad()
def trace(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> Trace:
    """Run `model` once and follow its channels.

    Args:
        model: a float model, not wrapped; on the meta device, all that does not come from its weights still runs.
        inputs: keyword or positional arguments of its forward; at least two tokens.

    Raises:
        ModelError: the forward asks for the value of an activation that has none on the meta device.
    """
    follower = Follower()
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with follower.watching(model), follower:
        outputs = model(*args, **kwargs)
    for tensor in tree_leaves(outputs if isinstance(outputs, (Tensor, tuple, list)) else dict(outputs)):
        follower.escape(tensor, "the model's output")
    return follower.trace


class Follower(TorchDispatchMode):
    """Sees every operation of a forward and keeps the marks."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._marks: dict[int, Mark] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the identity of a marked one
        self._inside = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Take the leaf modules of `model` as one operation each."""
        with ExitStack() as undo:
            for name, module in model.named_modules():
                if isinstance(module, Experts):
                    undo.callback(_replace_forward(module, lambda x, *_, first=module[0], **__: first(x)))
                if (leaf := find_leaf(module)) is None:
                    continue
                undo.callback(module.register_forward_pre_hook(partial(self._enter, name, leaf)).remove)
                undo.callback(module.register_forward_hook(partial(self._leave, name, leaf)).remove)
                if leaf.opaque:
                    undo.callback(_replace_forward(module, lambda x, *_, **__: torch.empty_like(x)))
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        if not self._inside:
            marked = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self._marks]
            if marked:
                self._follow(func, args, kwargs, out, marked)
        return out

    def escape(self, tensor: Any, why: str) -> None:
        """Somebody we do not know sees the channels of `tensor`."""
        if (mark := self._marks.get(id(tensor))) is not None:
            self.trace.escapes.append((_known(mark.ids), why))

    def _mark(self, tensor: Tensor, mark: Mark | None) -> None:
        self._marks.pop(id(tensor), None)
        if mark is not None and bool((mark.ids != _NOBODY).any()):
            self._marks[id(tensor)] = Mark(mark.ids.reshape(tensor.shape), mark.path)
            self._alive.append(tensor)

    def _new_source(self, name: str, leaf: Leaf | None, width: int) -> Source:
        if name not in self.trace.sources:
            self.trace.sources[name] = Source(name, leaf, self.trace.count, width)
            self.trace.count += width
        return self.trace.sources[name]

    def _enter(self, name: str, leaf: Leaf, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside += 1
        if not args or (mark := self._marks.get(id(args[0]))) is None:
            return
        if leaf.kind == "norm":
            ids = _known(mark.ids)
        else:
            known = leaf.reads is not None or leaf.kind == "batch_norm"
            channels = _channels(mark.ids, leaf.channel_axis) if known else None
            if channels is None:
                self.escape(args[0], f"{name} ({type(module).__name__})")
                return
            ids = channels
        before = self.trace.reads.setdefault(name, Read(name, leaf, ids, mark.path))
        if not torch.equal(before.ids, ids):
            self.trace.escapes += [(_known(seen), f"{name}, which runs more than once") for seen in (before.ids, ids)]

    def _leave(self, name: str, leaf: Leaf, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if leaf.writes is not None and isinstance(output, Tensor):
            axis = leaf.channel_axis
            ids = self._new_source(name, leaf, output.shape[axis]).ids
            shape = [1] * output.dim()
            shape[axis] = -1
            self._mark(output, Mark(ids.reshape(shape).expand(output.shape)))

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any, marked: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name in _SHAPE_ONLY:
            return
        rule = next((rule for names, rule in _RULES.items() if name in names), None)
        if name in _MOVES:
            done = self._move(func, name, args, kwargs, out)
        elif "scaled_dot_product" in name:
            done = self._attend(args, out)
        else:
            done = rule is not None and rule(self, args, out)
        if not done:
            for tensor in marked:
                self.escape(tensor, name)
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._mark(tensor, None)

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        if any(isinstance(t, Tensor) and t.is_meta and not t.is_floating_point() for t in tree_leaves(args)):
            return False  # an index that is not known
        path = frozenset[str]().union(*(self._marks[id(t)].path for t in tree_leaves(args) if id(t) in self._marks))
        ids = tree_map(self._ids, args)
        if name in _COPIES:
            moved = ids[0]
        elif name in _RESHAPES:
            moved = ids[0].reshape(out.shape)
        elif name == "constant_pad_nd":
            moved = func(*ids[:2], _NOBODY)
        else:
            moved = func(*ids, **tree_map(self._ids, kwargs))
        for tensor, its in zip(tree_leaves(out), tree_leaves(moved), strict=True):
            self._mark(tensor, Mark(its.contiguous(), path))
        return True

    def _ids(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._marks:
            return self._marks[id(value)].ids
        if value.is_floating_point():
            return torch.full(value.shape, _NOBODY)
        return value.cpu()

    def _scaled(self, args: Any, out: Tensor) -> bool:
        """`x * y` keeps the channels of one of them, which is the other's scale."""
        sides = [(t, self._marks[id(t)]) for t in args[:2] if isinstance(t, Tensor) and id(t) in self._marks]
        (tensor, mark), others = sides[-1], sides[:-1]
        for other, _ in others:
            self.escape(other, "a product")
        by = args[1] if tensor is args[0] else args[0]
        if not isinstance(by, Tensor) or by.numel() == 1:
            path = mark.path
        else:
            per_token = by.shape[-1] == 1 and out.dim() < _IMAGE_RANK
            path = mark.path | {"gain" if per_token else "product"}
        self._mark(out, Mark(mark.ids.expand(out.shape), path))
        return True

    def _divided(self, args: Any, out: Tensor) -> bool:
        return not (isinstance(args[1], Tensor) and id(args[1]) in self._marks) and self._scaled(args, out)

    def _same(self, args: Any, out: Tensor) -> bool:
        self._mark(out, self._marks[id(args[0])])
        return True

    def _positive(self, args: Any, out: Tensor) -> bool:
        mark = self._marks[id(args[0])]
        self._mark(out, Mark(mark.ids, mark.path | {"positive"}))
        return True

    def _clipped(self, args: Any, out: Tensor) -> bool:
        """No factor passes a limit, as that of a ReLU6; followed further, so that who reads the channels is told."""
        self.escape(args[0], "a function that clips at a constant, as ReLU6 does")
        return self._same(args, out)

    def _pooled(self, args: Any, out: Any) -> bool:
        first = tree_leaves(out)[0]
        mark = self._marks[id(args[0])]
        if (channels := _channels(mark.ids, 1)) is None:
            return False
        shape = [1, -1] + [1] * (first.dim() - 2)
        self._mark(first, Mark(channels.reshape(shape).expand(first.shape), mark.path | {"positive"}))
        return True

    def _averaged(self, args: Any, out: Tensor) -> bool:
        mark = self._marks[id(args[0])]
        if len(args) < 2 or not args[1]:
            return False
        low, high = mark.ids.amin(args[1], keepdim=True), mark.ids.amax(args[1], keepdim=True)
        if not torch.equal(low, high):
            return False
        self._mark(out, Mark(low.reshape(out.shape), mark.path | {"attention"}))
        return True

    def _added(self, args: Any, out: Tensor) -> bool:
        left, right = (self._marks.get(id(t)) for t in args[:2])
        if left is None or right is None:
            return False
        pairs = torch.stack([left.ids.expand(out.shape), right.ids.expand(out.shape)]).flatten(1)
        key, inverse = (pairs[0] * (self.trace.count + 1) + pairs[1]).unique(return_inverse=True)
        first = torch.empty_like(key).scatter_(0, inverse, torch.arange(len(inverse)))
        source = self._new_source(f"+{len(self.trace.sums)}", None, len(key))
        path = left.path | right.path
        self.trace.sums.append(Sum(source, pairs[0][first], pairs[1][first], path))
        self._mark(out, Mark((source.base + inverse).reshape(out.shape)))
        return True

    def _mixed(self, args: Any, out: Tensor) -> bool:
        """`bmm(a, b)` [X, T, D] keeps the channels of `b` [X, S, D] that all its rows S share, as attention does."""
        return self._mix(args[:1], args[1], out)

    def _attend(self, args: Any, out: Any) -> bool:
        return self._mix(args[:2], args[2], tree_leaves(out)[0])

    def _mix(self, seen: Sequence[Tensor], values: Tensor, out: Tensor) -> bool:
        mark = self._marks.get(id(values))
        if mark is None or not torch.equal(mark.ids.amin(-2), mark.ids.amax(-2)):
            return False
        for tensor in seen:
            self.escape(tensor, "attention scores")
        ids = mark.ids[..., :1, :]
        self.trace.heads.append(ids.reshape(-1, ids.shape[-1]).unique(dim=0))
        if ids.dim() == 4 and ids.shape[1] != out.shape[1]:
            ids = ids.repeat_interleave(out.shape[1] // ids.shape[1], 1)
        self._mark(out, Mark(ids.expand(out.shape), mark.path | {"attention"}))
        return True


_RULES: dict[frozenset[str], Any] = {
    frozenset({"mul", "mul_"}): Follower._scaled,
    frozenset({"div", "div_"}): Follower._divided,
    frozenset({"neg", "native_dropout", "dropout"}): Follower._same,
    _POSITIVE: Follower._positive,
    frozenset({"hardtanh", "hardtanh_"}): Follower._clipped,
    _POOLS: Follower._pooled,
    _MEANS: Follower._averaged,
    frozenset({"add", "add_"}): Follower._added,
    frozenset({"bmm"}): Follower._mixed,
}


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], object]:
    """Let `module` run `forward`; returns what undoes it."""
    module.__dict__["forward"] = forward
    return partial(module.__dict__.pop, "forward")


def _known(ids: Tensor) -> Tensor:
    ids = ids.unique()
    return ids[ids != _NOBODY]


def _channels(ids: Tensor, axis: int) -> Tensor | None:
    """The channel at each index of `axis`, where it is the same everywhere else; None where it is not."""
    rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
    return rows[0] if bool((rows == rows[0]).all()) else None


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; what has no weights on the meta device in it runs for real, such as masks and positions."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    meta = [t for t in tensors if t.is_meta]
    if not meta and str(kwargs.get("device")) == "meta":
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif meta and len(meta) < len(tensors):
        args, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    if meta and func.overloadpacket.__name__ == "_local_scalar_dense":
        raise ModelError("the forward depends on the value of an activation, which has none before weights are loaded")
    return func(*args, **kwargs)
