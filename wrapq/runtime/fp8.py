"""Kernels for fp8 weights with fp8 activations: FP8 and FP8_DYNAMIC, and FP8_BLOCK."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from wrapq.runtime.activations import ActivationQuantizer
from wrapq.runtime.kernel import KERNELS, Kernel, finished, has_plain_scales, is_not, not_by_row, scale_by_row

if TYPE_CHECKING:
    from wrapq.quant.spec import QuantSpec
    from wrapq.runtime.module import QuantizedWeight

_MULTIPLE, _BLOCK = 16, 128


class _FP8(Kernel):
    """What both have in common: fp8_e4m3 weights with float32 scales, as torch holds them."""

    devices: ClassVar[tuple[str, ...]]

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if reason := is_not("Linear", module, cls.devices):
            return reason
        spec, device = module.specs["weight"], module.weight_device
        if spec.dtype.name != "fp8_e4m3" or not has_plain_scales(spec):
            return f"weight {spec} is not fp8_e4m3 with float32 scales"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "fp8 needs compute capability 8.9"
        return None

    def __init__(self, module: QuantizedWeight) -> None:
        self.weight = module.codes().view(torch.float8_e4m3fn).contiguous()
        self.bias, self.activation = module.bias, cast(ActivationQuantizer, ActivationQuantizer.of(module))

    def codes(self) -> Tensor:
        return self.weight.view(torch.uint8)


@KERNELS.register("fp8_mm")
class FP8MM(_FP8):
    """`torch._scaled_mm` with scales of one, so that both scales can be applied to float32 sums."""

    name = "fp8_mm"
    arithmetic = "fp8 x fp8 summed in float32, on GPUs in a tensor core's precision, then scaled in float32"
    devices = ("cpu", "cuda")

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
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
        if reason := super().unsupported(module):
            return reason
        weight, activation = module.specs["weight"], module.specs.get("input")
        if weight.block_size != (_BLOCK, _BLOCK):
            return f"weight {weight}: not in blocks of {_BLOCK} x {_BLOCK}"
        if reason := ActivationQuantizer.unsupported(activation, "float", ("group",)):
            return reason
        if cast("QuantSpec", activation).group_size != _BLOCK:
            return f"input {activation}: not in groups of {_BLOCK}"
        if _multiplies_blocks(module.weight_device, *module.matrix_shape) or find_spec("torchao"):
            return None
        return "torch has no product of such blocks here, and torchao is not installed"

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        in_torch = _multiplies_blocks(self.weight.device, *self.weight.shape)
        scale = module.qparams("weight").scale.detach()
        self.multiply, self.scale = (_scaled_blocks, _aligned(scale)) if in_torch else (_torchao_blocks, scale)

    def run(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        return finished(self.multiply(a.q, a.scale, self.weight, self.scale).float(), self.bias, x)


def _scaled_blocks(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The product of `q` [M, K] with scales [M, K / 128] and `weight` [N, K] with `_aligned` scales [N / 128, K / 128].

    cuBLAS refuses some small M, and wants the scales of `q` column by column.
    """
    rows, missing = len(q), -len(q) % _BLOCK
    q = pad(q.view(torch.uint8), (0, 0, 0, missing)).view(q.dtype)
    scale = pad(scale.t(), (0, missing)).contiguous().t()
    return torch._scaled_mm(q, weight.t(), scale, weight_scale.t(), out_dtype=torch.float32)[:rows]


def _torchao_blocks(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    from torchao.kernel.blockwise_quantization import blockwise_fp8_gemm

    return blockwise_fp8_gemm(q, scale.contiguous(), weight, weight_scale, _BLOCK)


def _aligned(scale: Tensor) -> Tensor:
    """`scale` [R, G] in memory where each row begins at a multiple of four, which cuBLAS asks for."""
    groups = scale.shape[1]
    return pad(scale, (0, -groups % 4))[:, :groups]


@cache
def _multiplies_blocks(device: torch.device, rows: int, columns: int) -> bool:
    """Whether torch multiplies scaled blocks by a weight [rows, columns] on `device`, and rightly: which architectures,
    versions and shapes it does is not to be asked."""
    generator = torch.Generator(device).manual_seed(0)
    operands, dequantized = [], []
    for shape, block in (((_BLOCK, columns), (1, _BLOCK)), ((rows, columns), (_BLOCK, _BLOCK))):
        codes = torch.randint(-8, 9, shape, generator=generator, device=device).float()
        sides = [-(-size // side) for size, side in zip(shape, block, strict=True)]
        scale = 1 + torch.rand(sides, generator=generator, device=device)
        operands += [codes.to(torch.float8_e4m3fn), scale if block[0] == 1 else _aligned(scale)]
        wide = scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
        dequantized.append(codes * wide)
    try:
        error = _scaled_blocks(*operands) - dequantized[0] @ dequantized[1].t()
    except (RuntimeError, ValueError):
        return False
    return bool(error.abs().max() < 0.01 * columns)  # products are up to 256, their sums' size some sqrt(K)
