"""Modules whose forward is one operation: the original forward between a quantized input, weight and output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from wrapq.errors import CalibrationError
from wrapq.half_products import in_products
from wrapq.runtime.stand_in import original_class, without_weight
from wrapq.wrappers.base import INPUT, OUTPUT, WEIGHT, Point, Wrapper
from wrapq.wrappers.wrapper_registry import WRAPPERS

_IMAGES = tuple(replace(point, fixed_axes=None) for point in (INPUT, OUTPUT))
"""Of modules that images go through, whose channels are not the last axis."""


class Leaf(Wrapper):
    """One tensor in, one out; the bias, where there is one, stays in float."""

    points: ClassVar[tuple[Point, ...]] = (WEIGHT, INPUT, OUTPUT)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward on the quantized input; what a subclass takes besides goes to it as it is."""
        quantized = self.q("input", x)
        met = self.on_weight_input(x, quantized) if self.multiplies(self) else quantized
        with in_products():
            made = super().forward(met, *args, **kwargs)
        return self.q("output", self.repaired(met, made))


@WRAPPERS.register("torch.nn.modules.linear.Linear")
class Linear(Leaf):
    """`y = x W^T + b`, W [N, K]."""

    kind = "Linear"

    @classmethod
    def multiplies(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        rows, columns = cls.to_matrix(cast(Tensor, module.weight)).shape
        return columns if point == "input" else rows

    def input_matrix(self, x: Tensor) -> Tensor:
        """`x` [..., K] as [M, K]."""
        return x.reshape(-1, x.shape[-1])


@WRAPPERS.register("transformers.pytorch_utils.Conv1D")
class Conv1D(Linear):
    """transformers' linear layer of GPT-2, whose weight is stored as [K, N]; a rule's `type: Linear` means it too."""

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    @staticmethod
    def from_matrix(matrix: Tensor, layout: torch.Size) -> Tensor:
        return matrix.t()


class _ReachedKernel(Exception):  # noqa: N818 - no error: it ends a forward
    pass


class _UntilKernel(TorchFunctionMode):
    """Ends a forward at its first convolution, and keeps what that is given."""

    given: dict[str, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.conv1d, torch.conv2d, torch.conv3d):
            return func(*args, **(kwargs or {}))
        self.given = dict(zip(("input", "weight", "bias", "stride", "padding"), args, strict=False)) | (kwargs or {})
        raise _ReachedKernel


@WRAPPERS.register("torch.nn.modules.conv.Conv1d", "torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d")
class Conv(Leaf):
    """Convolutions; as a matrix the weight is [output channels, input channels of a group x kernel]."""

    kind = "Conv"
    points = (WEIGHT, *_IMAGES)

    @classmethod
    def fixed_axes(cls, module: nn.Module, point: Point) -> tuple[int, ...] | None:
        """The axis of the channels, which lie before the dimensions of the image, which the data decides."""
        return (-1 - len(cast(nn.Conv2d, module).kernel_size),)

    @classmethod
    def multiplies(cls, module: nn.Module) -> bool:
        return True

    @classmethod
    def groups(cls, module: nn.Module) -> int:
        """Those of the convolution, as many as channels in a depthwise one."""
        return cast(nn.Conv2d, module).groups

    @classmethod
    def reads(cls, module: nn.Module) -> tuple[object, ...]:
        """The kernel and how it moves over the image; the module itself where its own class decides that."""
        conv = cast(nn.Conv2d, module)
        own = module if cls.prepares_input(module) else None
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.groups, own

    @classmethod
    def prepares_input(cls, module: nn.Module) -> bool:
        """Whether the class of a convolution has a forward of its own, which may pad by what no attribute says: as in
        networks that come from TensorFlow, whose padding depends on the size of the image."""
        forward = cast(Any, original_class(module)).forward
        return forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def input_matrix(self, x: Tensor) -> Tensor:
        """The patches [M, K] that the kernel meets, M positions in all images `x` [B, C, ...] or [C, ...]; [G, M, K] of
        G groups of channels."""
        conv, dims = cast(nn.Conv2d, self), len(cast(nn.Conv2d, self).kernel_size)
        padding, mode = conv._reversed_padding_repeated_twice, cast(str, conv.padding_mode)
        if self.prepares_input(self):
            x, padding, mode = *self._met_by_kernel(x), "zeros"
        x = pad(x if x.dim() == dims + 2 else x[None], padding, mode="constant" if mode == "zeros" else mode)
        for axis, (size, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]  # [B, C, *positions, *kernel]
        x = x.movedim(1, dims + 1)  # [B, *positions, C, *kernel]
        if conv.groups == 1:
            return x.flatten(dims + 1).flatten(0, dims)
        return x.unflatten(dims + 1, (conv.groups, -1)).movedim(dims + 1, 0).flatten(dims + 2).flatten(1, dims + 1)

    def _met_by_kernel(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """What the forward of the convolution's own class makes of `x`, and with how many zeros that is padded."""
        with suppress(_ReachedKernel), _UntilKernel() as until:
            super(Leaf, self).forward(x)
        if until.given is None:
            raise CalibrationError(f"the forward of {original_class(self).__name__} calls no convolution of torch")
        conv, padding = cast(nn.Conv2d, self), until.given.get("padding", 0)
        if isinstance(padding, str):
            return until.given["input"], conv._reversed_padding_repeated_twice
        sizes = [padding] * len(conv.kernel_size) if isinstance(padding, int) else padding
        return until.given["input"], [size for each in reversed(sizes) for size in (each, each)]


_WITH_TABLE: set[type] = set()
"""The classes of embeddings that compute with their whole table, as far as any has run."""


class LookedUpRows(nn.Embedding):
    """A look-up that dequantizes the rows of its ids alone: a whole table takes more memory than all else of many a
    model."""

    weight_rows: Callable[[Tensor], Tensor | None]

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight_rows(input.flatten()) if self.max_norm is None else None
        return super().forward(input) if rows is None else rows.view(*input.shape, rows.shape[-1])


@WRAPPERS.register("torch.nn.modules.sparse.Embedding")
class Embedding(Wrapper):
    """A table [V, D] looked up by token; its input is an index and has no point."""

    kind = "Embedding"
    beneath = LookedUpRows
    points = (WEIGHT, OUTPUT)

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        return cast(Tensor, module.weight).shape[-1]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The quantized rows [B, T, D] of ids [B, T], or of whatever a subclass makes its ids from."""
        return self.q("output", self._rows(super().forward, *args, **kwargs))

    def _rows(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """What the class's own `forward` gives. It may ask the weight what it is, which lies on the meta device
        meanwhile; one that computes with all of it is run again, with the whole table."""
        if (own := original_class(self)) not in _WITH_TABLE and getattr(self, "max_norm", None) is None:
            with suppress(Exception), without_weight(self):
                rows = forward(*args, **kwargs)
                if not rows.is_meta:
                    return rows
            rows = forward(*args, **kwargs)  # raises what was wrong with the ids
            _WITH_TABLE.add(own)
            return rows
        return forward(*args, **kwargs)


@WRAPPERS.register("torch.nn.modules.normalization.LayerNorm")
class LayerNorm(Leaf):
    """Layer normalization as one operation."""

    kind = "LayerNorm"

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        return cast(nn.LayerNorm, module).normalized_shape[-1]


@WRAPPERS.register("torch.nn.modules.normalization.RMSNorm")
class RMSNorm(Leaf):
    """Root mean square normalization as one operation, under whatever class a family defines it."""

    kind = "RMSNorm"

    @classmethod
    def width(cls, module: nn.Module, point: str) -> int | None:
        weight = module._parameters.get("weight")
        return None if weight is None else weight.shape[-1]

    @staticmethod
    def matches(module: nn.Module) -> bool:  # type: ignore[override]
        """A class called ...RMSNorm with one vector as its only parameter and no children."""
        found = [(name, parameter.dim()) for name, parameter in module.named_parameters()]
        return type(module).__name__.endswith("RMSNorm") and found == [("weight", 1)] and not any(module.children())


_TORCH = ("SiLU", "GELU", "ReLU", "ReLU6", "Sigmoid", "Tanh", "Softmax")
_TRANSFORMERS = (
    *("SiLUActivation", "GELUActivation", "GELUTanh", "NewGELUActivation"),
    *("FastGELUActivation", "QuickGELUActivation", "ReLUSquaredActivation"),
)


@WRAPPERS.register(
    *(f"torch.nn.modules.activation.{name}" for name in _TORCH),
    *(f"transformers.activations.{name}" for name in _TRANSFORMERS),
)
class Activation(Leaf):
    """Elementwise functions and softmax, without parameters."""

    kind = "Activation"
    points = _IMAGES
