"""Kernels for 4 bit weights in groups with bfloat16 activations: W4A16, and W4A8, whose integers bfloat16 holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from wrapq.quant.affine import storage_dtype
from wrapq.runtime.activations import ActivationQuantizer
from wrapq.runtime.kernel import KERNELS, Kernel, fast_half, is_integer, is_not

if TYPE_CHECKING:
    from wrapq.runtime.module import QuantizedWeight

GROUPS = (32, 64, 128, 256)
FEW_ROWS = 16
"""Up to so many rows the kernel is used; above, the weight is dequantized in parts and multiplied."""
_BITS, _MIDDLE = 4, 8
_PART = 2**18
"""Elements dequantized at a time: the part stays in the processor's cache."""
_CUDA_TILES = (8, 4, 2)
FEW_CUDA_ROWS = 192
"""The same for CUDA: on an H200, with 11008 x 4096, the kernel takes 20 us for one row and 3.2 us for each more, 6.3 ms
for 2048; the dequantized weight .6 ms for 128 and .9 ms for 2048, and bfloat16 .03 and .25 ms."""
# half a microsecond to two faster than through torch.ops, which counts at a single row
_multiply_on_cpu: Any = getattr(torch, "_weight_int4pack_mm_for_cpu", None)


class _Int4(Kernel):
    """What both have in common: how integers become the kernel's operands, and what is done with its sums."""

    devices: ClassVar[tuple[str, ...]]
    rows_multiple: ClassVar[int]
    _pack: Callable[[Tensor], Tensor]
    _unpack: Callable[[], Tensor]
    _multiply: Callable[[Tensor], Tensor]
    _multiply_packed: Callable[[Tensor, Tensor], Tensor]
    """bfloat16 [M, N] from rows [M, K] and bfloat16 [K / g, N, 2]: `w = (u - 8) * scale + zero` for u from 0 to 15."""

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if reason := is_not("Linear", module, cls.devices):
            return reason
        spec, rows = module.specs["weight"], module.matrix_shape[0]
        if not is_integer(spec, _BITS):
            return f"weight {spec} is not a 4 bit integer with float32 scales"
        if spec.zero_point != "int":
            return f"weight {spec}: {spec.zero_point} zero points"
        if spec.granularity != "group" or spec.group_size not in GROUPS:
            return f"weight {spec}: not in groups of {', '.join(map(str, GROUPS))}"
        if "input" in module.specs and (reason := ActivationQuantizer.unsupported(module.specs["input"])):
            return reason
        return f"{rows} rows are no multiple of {cls.rows_multiple}" if rows % cls.rows_multiple else None

    def __init__(self, module: QuantizedWeight) -> None:
        spec, qparams = module.specs["weight"], module.qparams("weight")
        self.dtype, self.shape, self.group = spec.dtype, module.matrix_shape, spec.group_size or 1
        self.bias, self.activation = module.bias, ActivationQuantizer.of(module)
        self.order = None if qparams.permutation is None else torch.argsort(qparams.permutation)
        codes = module.codes()
        ordered = codes if self.order is None else codes[:, self.order]
        self.packed = self._pack(ordered.to(torch.int32).sub_(spec.dtype.qmin))

    def codes(self) -> Tensor:
        codes = self._unpack().add_(self.dtype.qmin).to(storage_dtype(self.dtype))
        return codes if self.order is None else codes[:, torch.argsort(self.order)]

    def run(self, x: Tensor) -> Tensor:
        """The module's output for `x`: the activation's integers, exact in bfloat16, are multiplied, then scaled."""
        if self.activation is None:
            return self._finish(self._multiply(self._rows(x)), x)
        a = self.activation(x)
        integers = self._rows(a.q).bfloat16()
        y = self._multiply(integers.sub_(a.zero) if a.zero else integers)
        return self._finish(y.float().mul_(a.scale), x)

    def _read_off(self) -> Tensor:
        """The integers of a layout of which only the kernel knows the order: what it multiplies the identity with."""
        (n, k), device = self.shape, self.packed.device
        plain = torch.tensor([1.0, 0.0], device=device).expand(k // self.group, n, 2).bfloat16().contiguous()
        eye = torch.eye(k, dtype=torch.bfloat16, device=device)
        return self._multiply_packed(eye, plain).t().to(torch.int32).add_(_MIDDLE)

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` [M, N] with the bias, in the shape and dtype that the float operation on `x` gives."""
        y = y.float() if x.dtype == torch.float32 else y.to(x.dtype)  # the first is a call of half the time
        y = y if self.bias is None else y + self.bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.shape[1])
        return rows if self.order is None else rows.index_select(1, self.order)


@KERNELS.register("int4_cpu")
class Int4CPU(_Int4):
    """`_weight_int4pack_mm_for_cpu` for few rows; for many, the same layout dequantized part by part."""

    name = "int4_cpu"
    arithmetic = "bfloat16 scales, zero points and, where the kernel itself runs, activations; summed in float32"
    devices, rows_multiple = ("cpu",), 16

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if _multiply_on_cpu is None:
            return "this torch has no 4 bit kernel for CPUs"
        return super().unsupported(module)

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        block = _block()
        self.block = block if block is not None and self.shape[0] % block == 0 else None
        self.scale = _by_group(module, "weight_scale")
        self.symmetric = module.qparams("weight").zero_point is None
        self.signed = module.specs["weight"].signed_scale
        self.zero_point = None if self.symmetric else _by_group(module, "weight_zero_point")
        # where the processor multiplies bfloat16 the kernel is the faster one for any number of rows
        self.most_rows = None if self.block is None or fast_half(module.weight_device) else FEW_ROWS

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.most_rows is None or len(rows) <= self.most_rows:
            return self._multiply_packed(rows.bfloat16(), self._scales_and_zeros())
        return self._many(rows)

    def _multiply_packed(self, rows: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return _multiply_on_cpu(rows, self.packed, self.group, scales_and_zeros)

    def _scales_and_zeros(self) -> Tensor:
        """The pairs that `_multiply_packed` takes, made at every call.

        Held, it would cost as much memory as the scales, which it cannot replace: bfloat16 drops their lower half.
        A pair is one word, the scale's upper half below that of the zero: arithmetic of words is what torch
        vectorizes, while it writes every second bfloat16 one by one.
        """
        words = _upper_half(self.scale)
        if self.signed:
            words.bitwise_and_(0xFFFF)
        if self.zero_point is not None:
            shift = self.zero_point.view(torch.int8).neg()
            if middle := _MIDDLE + self.dtype.qmin:
                shift.add_(middle)
            words.add_(_upper_half(self.scale * shift), alpha=1 << 16)
        return words.view(torch.bfloat16)

    def _many(self, rows: Tensor) -> Tensor:
        """Dequantize some blocks of the weight to float32, multiply, and forget them."""
        (n, k), x, half = self.shape, rows.float(), (self.block or self.shape[0]) // 2
        nibbles = self.packed.view(torch.int8).view(-1, k, half)
        y = torch.empty(len(rows), n)
        blocks = max(1, _PART // (2 * half * k))
        scratch = torch.empty(min(blocks, len(nibbles)), 2, k, half)
        parameters = self._scales_and_zeros().float().view(k // self.group, -1, 2, half, 2).permute(4, 1, 2, 0, 3)
        for start in range(0, len(nibbles), blocks):
            part = slice(start, start + blocks)
            weight = self._dequantize(nibbles[part], parameters[:, part], scratch)
            y.view(len(rows), -1, 2, half)[:, part] = torch.matmul(x, weight).permute(2, 0, 1, 3)
        return y

    def _dequantize(self, nibbles: Tensor, parameters: Tensor, scratch: Tensor) -> Tensor:
        """The weight of some blocks [blocks, 2, K, block / 2]: lower and upper nibbles are halves of a block.

        Lower nibbles become u - 8 and upper ones 16 (u - 8): shifts of bytes are slow, masks are not.
        """
        weight = scratch[: len(nibbles)]
        weight[:, 0] = nibbles.bitwise_and(15).sub_(_MIDDLE)
        weight[:, 1] = nibbles.bitwise_xor(-128).bitwise_and_(-16)
        scale = torch.stack([parameters[0, :, 0], parameters[0, :, 1] / 16], 1).unsqueeze(3)
        grouped = weight.view(*weight.shape[:2], -1, self.group, weight.shape[3])  # [blocks, 2, K / g, g, block / 2]
        grouped.mul_(scale)
        if not self.symmetric:
            grouped.add_(parameters[1].unsqueeze(3))
        return weight

    def _pack(self, unsigned: Tensor) -> Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)

    def _unpack(self) -> Tensor:
        if self.block is None:
            return self._read_off()
        return _unpack_blocks(self.packed, *self.shape, self.block)


@KERNELS.register("int4_cuda")
class Int4CUDA(_Int4):
    """`_weight_int4pack_mm`, the tensor core kernel of torch for CUDA."""

    name = "int4_cuda"
    arithmetic = "bfloat16 activations, scales, zero points and output"
    devices, rows_multiple = ("cuda",), 8

    def __init__(self, module: QuantizedWeight) -> None:
        super().__init__(module)
        qparams = module.qparams("weight")
        scale = qparams.scale.detach().expand(self.shape[0], -1)
        zero = torch.zeros_like(scale)
        if qparams.zero_point is not None:
            zero = scale * (_MIDDLE + self.dtype.qmin - qparams.zero_point)
        # held, since launches cost too much to make it at every call
        self.known = _knows_tiles(module.weight_device, _tiles(self.shape[1]))
        self.scales_and_zeros = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        if reason := super().unsupported(module):
            return reason
        if torch.cuda.get_device_capability(module.weight_device) < (8, 0):
            return "the kernel needs compute capability 8.0"
        columns = module.matrix_shape[1]
        return None if _tiles(columns) else f"{columns} columns are no multiple of {_CUDA_TILES[-1] * 16}"

    def _pack(self, unsigned: Tensor) -> Tensor:
        return _pack_tiles(unsigned, _tiles(self.shape[1]))

    def _unpack(self) -> Tensor:
        return _unpack_tiles(self.packed).to(torch.int32) if self.known else self._read_off()

    def _multiply(self, rows: Tensor) -> Tensor:
        if len(rows) > FEW_CUDA_ROWS and self.known:
            return rows.bfloat16() @ self._dequantized().t()
        return self._multiply_packed(rows.bfloat16(), self.scales_and_zeros)

    def _dequantized(self) -> Tensor:
        """The weight in bfloat16 [N, K]."""
        weight = _unpack_tiles(self.packed).bfloat16().sub_(_MIDDLE)
        grouped = weight.unflatten(1, (-1, self.group))
        scale, zero = self.scales_and_zeros.transpose(0, 1).unsqueeze(3).unbind(2)  # [N, K / g, 1]
        torch.addcmul(zero, grouped, scale, out=grouped)
        return weight

    def _multiply_packed(self, rows: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, scales_and_zeros)


def _by_group(module: QuantizedWeight, name: str) -> Tensor:
    """The module's tensor `name` [N, K / g] as [K / g, N, 1], contiguous, in memory that both share from here on."""
    tensor = cast(Tensor, getattr(module, name))
    by_group = tensor.detach().expand(module.matrix_shape[0], -1).t().contiguous()
    if tensor.shape == by_group.t().shape:
        tensor.data = by_group.t()
    return by_group.unsqueeze(-1)


def _upper_half(x: Tensor) -> Tensor:
    """float32 `x` rounded to bfloat16, as int32 words."""
    return x.bfloat16().view(torch.int16).int()


def _tiles(columns: int) -> int:
    """The largest number of inner tiles, of 16 columns each, that divides `columns`; 0 when none does."""
    return next((tiles for tiles in _CUDA_TILES if columns % (tiles * 16) == 0), 0)


def _pack_tiles(unsigned: Tensor, tiles: int) -> Tensor:
    """int32 [N / 8, K / 16 t, 32, t / 2] for t `tiles`, the layout of torch's kernel for CUDA."""
    pairs = unsigned[:, ::2].bitwise_left_shift(4).bitwise_or_(unsigned[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


def _unpack_tiles(packed: Tensor) -> Tensor:
    """uint8 [N, K] of `_pack_tiles`.

    A word holds what one of 32 threads needs of two tiles of 16 columns: thread 4 r + c has row r and of each half of a
    tile the columns 2 c and 2 c + 1. Bytes go by (odd column, tile), their nibbles by half.
    """
    n, k, _, words = packed.shape
    pairs = packed.view(torch.uint8).view(n, k, 8, 4, words, 2, 2)  # row, c; odd, tile
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1)
    return nibbles.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(n * 8, k * words * 32)


@cache
def _knows_tiles(device: torch.device, tiles: int) -> bool:
    """Whether the layout is the one that `_unpack_tiles` knows; else only the kernel itself can read it."""
    generator = torch.Generator().manual_seed(0)
    unsigned = torch.randint(0, 16, (16, 32 * tiles), dtype=torch.int32, generator=generator).to(device)
    return torch.equal(_unpack_tiles(_pack_tiles(unsigned, tiles)), unsigned)


@cache
def _block() -> int | None:
    """Rows per block of the CPU's layout, which depends on its vector width; None when the layout is another one."""
    unsigned = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return next((b for b in (64, 32, 16) if torch.equal(_unpack_blocks(packed, 64, 32, b), unsigned)), None)


def _unpack_blocks(packed: Tensor, n: int, k: int, block: int) -> Tensor:
    """int32 [N, K] of blocks [N / block, K, block / 2] whose lower nibbles are the first half of the rows."""
    nibbles = packed.view(n // block, k, block // 2)
    rows = torch.cat([nibbles & 15, nibbles >> 4], -1)
    return rows.transpose(1, 2).reshape(n, k).to(torch.int32)
