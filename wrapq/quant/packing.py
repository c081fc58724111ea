"""Codes of 2 to 16 bits as a dense stream of bits in int32 words, as compressed-tensors' pack-quantized format.

Element k of a row takes the bits `k * bits` to `(k + 1) * bits` of that row, lowest first, so an element may lie across
two words. Stored is `q - least_code`, which is never negative. A row ends with zero bits up to a whole word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.quant.affine import row_parts, storage_dtype
from wrapq.quant.dtypes import DType

WORD = 32


def packed_columns(columns: int, dtype: DType) -> int:
    """The number of words of a packed row of `columns` elements."""
    return -(-columns * dtype.bits // WORD)


def pack(q: Tensor, dtype: DType) -> Tensor:
    """Pack integers [..., K] into int32 words [..., ceil(K * bits / 32)]; raises `SpecError` for one off the grid."""
    low, high = (int(bound) for bound in torch.aminmax(q)) if q.numel() else (0, 0)
    if low < dtype.least_code or high > dtype.largest_code:
        raise SpecError(f"{dtype} holds {dtype.least_code} to {dtype.largest_code}, not {low} to {high}")
    packed = torch.empty(*q.shape[:-1], packed_columns(q.shape[-1], dtype), dtype=torch.int32, device=q.device)
    for part in row_parts(q):
        packed[part] = _pack(q[part], dtype)
    return packed


def _pack(q: Tensor, dtype: DType) -> Tensor:
    elements, words = _period(dtype)
    columns = q.shape[-1]
    blocks = -(-columns // elements)
    padded = torch.nn.functional.pad(q, (0, blocks * elements - columns), value=dtype.least_code)
    parts = padded.unflatten(-1, (blocks, elements))  # [..., blocks, elements]
    out = torch.zeros(*q.shape[:-1], blocks, words, dtype=torch.int32, device=q.device)
    for element, word, offset, spill in _bit_fields(dtype):
        value = parts[..., element].to(torch.int32).sub_(dtype.least_code)
        out[..., word] |= value << offset
        if spill:
            out[..., word + 1] |= value >> (dtype.bits - spill)
    return out.flatten(-2)[..., : packed_columns(columns, dtype)]


def unpack(packed: Tensor, dtype: DType, columns: int) -> Tensor:
    """The integers [..., columns] that `pack` made int32 words [..., W] of, in `storage_dtype`; raises `SpecError`
    where W is not that of `columns`."""
    if packed.shape[-1] != (needed := packed_columns(columns, dtype)):
        raise SpecError(f"{columns} columns of {dtype} are {needed} words, not {packed.shape[-1]}")
    codes = torch.empty(*packed.shape[:-1], columns, dtype=storage_dtype(dtype), device=packed.device)
    for part in row_parts(codes):
        codes[part] = _unpack(packed[part], dtype, columns)
    return codes


def _unpack(packed: Tensor, dtype: DType, columns: int) -> Tensor:
    elements, words = _period(dtype)
    blocks = -(-columns // elements)
    padded = torch.nn.functional.pad(packed, (0, blocks * words - packed.shape[-1]))
    parts = padded.unflatten(-1, (blocks, words))  # [..., blocks, words]
    out = torch.empty(*packed.shape[:-1], blocks, elements, dtype=storage_dtype(dtype), device=packed.device)
    for element, word, offset, spill in _bit_fields(dtype):
        low_bits = dtype.bits - spill
        value = (parts[..., word] >> offset).bitwise_and_((1 << low_bits) - 1)  # without copied signs
        if spill:
            value |= (parts[..., word + 1] & ((1 << spill) - 1)) << low_bits
        out[..., element] = value.add_(dtype.least_code)
    return out.flatten(-2)[..., :columns]


def _period(dtype: DType) -> tuple[int, int]:
    """Elements and words after which the pattern of offsets repeats."""
    common = math.gcd(WORD, dtype.bits)
    return WORD // common, dtype.bits // common


def _bit_fields(dtype: DType) -> Iterator[tuple[int, int, int, int]]:
    """For each element of a period its number, word and first bit there, and how many bits spill into the next word."""
    for element in range(_period(dtype)[0]):
        word, offset = divmod(element * dtype.bits, WORD)
        yield element, word, offset, max(0, offset + dtype.bits - WORD)
