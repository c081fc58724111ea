"""Kernels for fp8 weights with fp8 activations: FP8 and FP8_DYNAMIC, and FP8_BLOCK."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from wrapq.runtime.activations import ActivationQuantizer
from wrapq.runtime.kernel import KERNELS, Kernel, finished, is_not, not_by_row, scale_by_row

if TYPE_CHECKING:
    from wrapq.quant.spec import QuantSpec
    from wrapq.runtime.module import QuantizedWeight

_MULTIPLE, _BLOCK = 16, 128


class _FP8(Kernel):
    """What both have in common: fp8_e4m3 weights with float32 scales, as torch holds them."""

    devices: ClassVar[tuple[str, ...]]

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        """See `Kernel.unsupported`."""
        if reason := is_not("Linear", module):
            return reason
        spec, device = module.specs["weight"], module.weight_device
        if device.type not in cls.devices:
            return f"not for {device.type}"
        if spec.dtype.name != "fp8_e4m3" or spec.scale_dtype != "float32" or spec.global_scale:
            return f"weight {spec} is not fp8_e4m3 with float32 scales"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "fp8 needs compute capability 8.9"
        return None

    def __init__(self, module: QuantizedWeight) -> None:
        self.weight = module.codes().view(torch.float8_e4m3fn).contiguous()
        self.bias, self.activation = module.bias, cast(ActivationQuantizer, ActivationQuantizer.of(module))

    def codes(self) -> Tensor:
        """See `Kernel.codes`."""
        return self.weight.view(torch.uint8)


@KERNELS.register("fp8_mm")
class FP8MM(_FP8):
    """`torch._scaled_mm` with scales of one, so that both scales can be applied to float32 sums."""

    name = "fp8_mm"
    arithmetic = "fp8 x fp8 summed in float32, on GPUs in a tensor core's precision, then scaled in float32"
    devices = ("cpu", "cuda")

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        """See `Kernel.unsupported`."""
        if reason := super().unsupported(module) or not_by_row(module.specs["weight"]):
            return reason
        rows, columns = module.matrix_shape
        if rows % _MULTIPLE or columns % _MULTIPLE:
            return f"{rows} x {columns} are not multiples of {_MULTIPLE}"
        return ActivationQuantizer.unsupported(module.specs.get("input"), "float")

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.scale, self.one = scale_by_row(module), torch.ones((), device=self.weight.device)

    def run(self, x: Tensor) -> Tensor:
        """See `Kernel.run`."""
        a = self.activation(x)
        y = torch._scaled_mm(a.q, self.weight.t(), self.one, self.one, out_dtype=torch.float32)
        return finished(y.mul_(self.scale).mul_(a.scale), self.bias, x)


@KERNELS.register("fp8_block")
class FP8Block(_FP8):
    """Weights in blocks of 128 x 128 times inputs in groups of 128: `torch._scaled_mm` where it has such a product
    (Hopper), else torchao's, which tunes itself for 20 s at each new shape and took twice as long on an H200."""

    name = "fp8_block"
    arithmetic = "fp8 x fp8, each block summed in a tensor core's precision and scaled in float32"
    devices = ("cuda",)

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        """See `Kernel.unsupported`."""
        if reason := super().unsupported(module):
            return reason
        weight, activation = module.specs["weight"], module.specs.get("input")
        if weight.block_size != (_BLOCK, _BLOCK):
            return f"weight {weight}: not in blocks of {_BLOCK} x {_BLOCK}"
        if reason := ActivationQuantizer.unsupported(activation, "float", ("group",)):
            return reason
        if cast("QuantSpec", activation).group_size != _BLOCK:
            return f"input {activation}: not in groups of {_BLOCK}"
        if cls._in_torch(module) or find_spec("torchao"):
            return None
        return "torch has no product of such blocks here, and torchao is not installed"

    @staticmethod
    def _in_torch(module: QuantizedWeight) -> bool:
        rows, columns = module.matrix_shape
        return not rows % _BLOCK and not columns % (4 * _BLOCK) and _multiplies_blocks(module.weight_device)

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.scale = module.qparams("weight").scale.detach()
        self.multiply = _scaled_blocks if self._in_torch(module) else _torchao_blocks

    def run(self, x: Tensor) -> Tensor:
        """See `Kernel.run`."""
        a = self.activation(x)
        return finished(self.multiply(a.q, a.scale, self.weight, self.scale).float(), self.bias, x)


def _scaled_blocks(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The product of `q` [M, K] with scales [M, K / 128] and `weight` [N, K] with scales [N / 128, K / 128].

    cuBLAS refuses some small M, and wants the scales of `q` column by column.
    """
    rows, missing = len(q), -len(q) % _BLOCK
    q = pad(q.view(torch.uint8), (0, 0, 0, missing)).view(q.dtype)
    scale = pad(scale.t(), (0, missing)).contiguous().t()
    return torch._scaled_mm(q, weight.t(), scale, weight_scale.t(), out_dtype=torch.float32)[:rows]


def _torchao_blocks(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    from torchao.kernel.blockwise_quantization import blockwise_fp8_gemm

    return blockwise_fp8_gemm(q, scale.contiguous(), weight, weight_scale, _BLOCK)


@cache
def _multiplies_blocks(device: torch.device) -> bool:
    """Whether torch multiplies scaled blocks on `device`: which architectures and versions do is not to be asked."""
    zeros = torch.zeros(_BLOCK, 4 * _BLOCK, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scales = torch.ones(_BLOCK, 4, device=device)
    try:
        return _scaled_blocks(zeros, scales, zeros, scales[:1]).isfinite().all().item() is True
    except (RuntimeError, ValueError):
        return False
