"""What a kernel is: one way to compute a converted module faster than by dequantizing its weight at every call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from wrapq.registry import Registry
from wrapq.runtime.stand_in import original_class

if TYPE_CHECKING:
    from wrapq.quant.spec import QuantSpec
    from wrapq.runtime.module import QuantizedWeight


class Inapplicable(str):
    """Why a kernel cannot compute a module, where it is meant for other kinds of module or device."""


class Kernel(ABC):
    """A converted module's weight in the layout of one kernel, and the call of it.

    Making an instance prepares the layout. The module makes it at its first forward and then gives up its own packed
    weight, which `codes` gives back: the weight is in memory once. An instance is never saved, copied or moved.

        @KERNELS.register("my_kernel")
        class MyKernel(Kernel):
            arithmetic = "int8 x int8 into int32"
    """

    name: ClassVar[str]
    """What it is registered as."""
    holds_weight: ClassVar[bool] = True
    """Whether the layout contains the weight, so that the module need not keep it too."""
    hidden_bytes: int = 0
    """What its layout takes in memory besides `tensors`."""
    arithmetic: ClassVar[str]
    """What is computed, in which precision, where it differs from dequantizing and multiplying in float32."""

    @classmethod
    @abstractmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        """Why the kernel cannot compute `module`, in words for a report; None when it can."""

    @abstractmethod
    def __init__(self, module: QuantizedWeight) -> None: ...

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """The module's output for `x` as it came, before the output's own quantization."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The integers [N, K] of the weight, as the module's `set_weight` took them."""

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that the kernel keeps, those that it shares with its module included."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))


KERNELS: Registry[type[Kernel]] = Registry("kernel", "wrapq.runtime")
REFERENCE = "reference"
"""The name of computing without a kernel: dequantize, then the float operation."""
_FORWARDS = {
    "torch.nn.modules.linear.Linear": "Linear",
    "transformers.pytorch_utils.Conv1D": "Linear",
    "torch.nn.modules.sparse.Embedding": "Embedding",
}


def is_not(kind: str, module: QuantizedWeight, devices: Collection[str] = ()) -> str | None:
    """Why `module` does not compute what a plain module of `kind` does, on one of `devices` if given; None when it
    does."""
    if module.wrapper.kind != kind:
        return Inapplicable(f"{module.wrapper.__name__} is not {kind}")
    own = next(cls for cls in original_class(module).__mro__ if "forward" in vars(cls))
    if _FORWARDS.get(f"{own.__module__}.{own.__qualname__}") != kind:
        return f"{own.__qualname__} has a forward of its own"
    device = module.weight_device.type
    return Inapplicable(f"not for {device}") if devices and device not in devices else None


def has_plain_scales(spec: QuantSpec) -> bool:
    """Whether the scales of `spec` are float32 and relative to no other."""
    return spec.scale_dtype == "float32" and not spec.global_scale


def is_integer(spec: QuantSpec, bits: int) -> bool:
    """Whether the grid of `spec` is that of integers with `bits` bits and plain float32 scales."""
    return has_plain_scales(spec) and spec.dtype.kind == "int" and spec.dtype.bits == bits


def not_by_row(spec: QuantSpec) -> str | None:
    """Why a weight of `spec` has no single scale for each output row, or None when it has."""
    if spec.granularity == "channel" and spec.axis not in (0, -2):
        return f"weight {spec}: scales run along the inputs"
    fits = spec.granularity in ("tensor", "channel")
    return None if fits else f"weight {spec}: a scale per {spec.granularity}, not per channel or tensor"


def scale_by_row(module: QuantizedWeight) -> Tensor:
    """The weight's scale for each output row [N], of a spec that `not_by_row` lets pass."""
    return module.qparams("weight").scale.detach().reshape(-1).expand(module.matrix_shape[0]).contiguous()


def finished(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`y` float32 [M, N], which is changed, with the bias, in the shape and dtype that the float operation on `x`
    gives."""
    y = y if bias is None else y.add_(bias)
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def fast_half(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices faster than float32 ones."""
    if device.type != "cpu":
        return True
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(check() for name in checks if (check := getattr(torch.cpu, name, None)) is not None)
