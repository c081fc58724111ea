"""Kernels for int8 weights: with int8 activations (W8A8), and with float ones (W8A16)."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from wrapq.runtime.activations import ActivationQuantizer, QuantizedActivation
from wrapq.runtime.kernel import KERNELS, Kernel, finished, is_integer, is_not, not_by_row, scale_by_row

if TYPE_CHECKING:
    from wrapq.quant.spec import QuantSpec
    from wrapq.runtime.module import QuantizedWeight

_CUDA_ROWS = 32
"""torch._int_mm on CUDA wants more than 16 rows; fewer are padded to this many."""
_CUDA_MULTIPLE = 8

_BLOCK = (48, 512)
"""Rows and columns of a block of fbgemm's layout where the processor has AVX512 VNNI; the last ones are filled up."""
_MOST_PADDING = 0.02

_PART = 2**18
"""Weights made float32 at a time: the part stays in the processor's cache."""


class _Int8(Kernel):
    """What they have in common: int8 weights per output row or per tensor, no weight zero point."""

    devices: ClassVar[tuple[str, ...]]
    weight: Tensor

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if reason := is_not("Linear", module, cls.devices):
            return reason
        spec = module.specs["weight"]
        if not is_integer(spec, 8) or not spec.dtype.signed or not spec.symmetric:
            return f"weight {spec} is not symmetric int8"
        return not_by_row(spec) or cls._unsupported_input(module.specs.get("input"))

    @classmethod
    def _unsupported_input(cls, spec: QuantSpec | None) -> str | None:
        return ActivationQuantizer.unsupported(spec)

    def __init__(self, module: QuantizedWeight) -> None:
        self.scale, self.bias = scale_by_row(module), module.bias
        self.weight = module.codes().contiguous()

    def codes(self) -> Tensor:
        return self.weight


class _Int8Activation(_Int8):
    """Integers times integers."""

    arithmetic: ClassVar[str] = "int8 x int8 into int32, then scaled in float32; NaN in a static input is lost"

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.activation = cast(ActivationQuantizer, ActivationQuantizer.of(module))


@KERNELS.register("int8_mm")
class Int8MM(_Int8Activation):
    """`torch._int_mm` on the plain int8 matrix [N, K]: the faster one for a single row."""

    name = "int8_mm"
    devices = ("cpu", "cuda")

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if reason := super().unsupported(module):
            return reason
        rows, columns = module.matrix_shape
        unfit = module.weight_device.type == "cuda" and (rows % _CUDA_MULTIPLE or columns % _CUDA_MULTIPLE)
        return f"{rows} x {columns} are not multiples of {_CUDA_MULTIPLE}" if unfit else None

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.columns = self.weight.t()
        zero = self.activation.zero
        self.offset = self.weight.sum(1, dtype=torch.int32).mul_(-zero) if zero else None

    def run(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        sums = self._multiply(a)
        if self.offset is not None:
            sums.add_(self.offset)
        y = sums.view(torch.float32).copy_(sums)  # in the same memory: fresh pages cost more than the arithmetic
        return finished(y.mul_(self.scale).mul_(a.scale), self.bias, x)

    def _multiply(self, a: QuantizedActivation) -> Tensor:
        rows = a.q.shape[0]
        if a.q.is_cuda and rows < _CUDA_ROWS:
            return torch._int_mm(pad(a.q, (0, 0, 0, _CUDA_ROWS - rows)), self.columns)[:rows].contiguous()
        return torch._int_mm(a.q, self.columns)


@KERNELS.register("int8_onednn")
class Int8OneDNN(_Int8Activation):
    """oneDNN's uint8 x int8 linear on a weight packed for the CPU: the faster one for many rows."""

    name = "int8_onednn"
    devices = ("cpu",)

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "this torch has no oneDNN linear for integers"
        return super().unsupported(module) or _without_vnni()

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)  # [K, N], opaque
        self.no_zeros = torch.zeros(module.matrix_shape[0], dtype=torch.int32)

    def run(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        unsigned = (a.q ^ -128).view(torch.uint8)  # 128 higher
        operands = (unsigned, 1.0, a.zero + 128, self.weight, self.scale, self.no_zeros, None, 1.0, 0)
        y = torch.ops.onednn.qlinear_pointwise(*operands, torch.float32, "none", [], "")
        return finished(y.mul_(a.scale), self.bias, x)

    def codes(self) -> Tensor:
        return self.weight.to_dense().t()


@KERNELS.register("int8_fbgemm")
class Int8FBGEMM(_Int8Activation):
    """fbgemm's uint8 x int8 linear: a single row in half the time of the others, where its blocks fit the weight."""

    name = "int8_fbgemm"
    devices = ("cpu",)

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        known = hasattr(torch, "_make_per_tensor_quantized_tensor")
        if not known or "fbgemm" not in torch.backends.quantized.supported_engines:
            return "this torch has no fbgemm"
        if reason := super().unsupported(module) or _without_vnni():
            return reason
        (n, k), padded = module.matrix_shape, _padded(module.matrix_shape)
        fits = padded <= (1 + _MOST_PADDING) * n * k
        return None if fits else f"its layout of {n} x {k} takes {padded / (n * k) - 1:.0%} more memory than the weight"

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.hidden_bytes = _padded(module.matrix_shape)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"  # whose layout the operator then knows by its type
        try:
            with warnings.catch_warnings(action="ignore"):  # torch will give such tensors up: see `unsupported`
                plain = torch._make_per_tensor_quantized_tensor(self.weight, 1.0, 0)
            self.packed = torch.ops.quantized.linear_prepack(plain, None)
        finally:
            torch.backends.quantized.engine = engine
        del self.weight

    def run(self, x: Tensor) -> Tensor:
        a = self.activation(x)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        integers = a.q.float()  # which it rounds to themselves
        y = multiply(integers.sub_(a.zero) if a.zero else integers, 1.0, a.zero + 128, self.packed)
        return finished(y.mul_(self.scale).mul_(a.scale), self.bias, x)

    def codes(self) -> Tensor:
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()


def _without_vnni() -> str | None:
    return None if torch.cpu._is_vnni_supported() else "without VNNI the CPU's 16 bit sums saturate"


def _padded(shape: tuple[int, int]) -> int:
    """Elements of fbgemm's layout of a weight."""
    return math.prod(-(-length // block) * block for length, block in zip(shape, _BLOCK, strict=True))


@KERNELS.register("int8_weight")
class Int8Weight(_Int8):
    """int8 weights that are small rather than fast: `torch._weight_int8pack_mm` in a bfloat16 model on a CPU.

    In other models on a CPU bfloat16 would cost more than int8 weights do; there the weight becomes float32 part by
    part. On a GPU, where that kernel takes .3 ms for a single row and 200 ms for 2048, it becomes the model's dtype.
    """

    name = "int8_weight"
    arithmetic = "that of the model's dtype (a CPU's bfloat16 or else float32), the sums scaled; float16: the weights"
    devices = ("cpu", "cuda")

    @classmethod
    def _unsupported_input(cls, spec: QuantSpec | None) -> str | None:
        return None if spec is None else f"input {spec} is quantized"

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        self.half = module.weight_dtype == torch.bfloat16 and not self.weight.is_cuda
        if self.half:
            self.scale = self.scale.bfloat16()

    def run(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.is_cuda:
            return finished(self._on_gpu(rows), self.bias, x)
        if self.half:
            y = torch._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale)
            return finished(y.float(), self.bias, x)
        return finished(self._multiply(rows.float()), self.bias, x)

    def _on_gpu(self, rows: Tensor) -> Tensor:
        weight = self.weight.to(rows.dtype)
        if rows.dtype == torch.float16:  # whose sums of whole integers would overflow
            return (rows @ weight.mul_(self.scale[:, None]).t()).float()
        return (rows @ weight.t()).float().mul_(self.scale)

    def _multiply(self, rows: Tensor) -> Tensor:
        count, columns = self.weight.shape
        y, step = rows.new_empty(len(rows), count), max(1, _PART // columns)
        scratch = rows.new_empty(min(step, count), columns)
        for start in range(0, count, step):
            part = self.weight[start : start + step]
            y[:, start : start + step] = rows @ scratch[: len(part)].copy_(part).t()
        return y.mul_(self.scale)
