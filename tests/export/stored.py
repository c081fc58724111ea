"""Quantized layers of a compressed-tensors checkpoint as numbers to compute with, and the arithmetic of their grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wrapq.quant.dtypes import dtype_named
from wrapq.quant.packing import unpack
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec

Tensors = dict[str, Tensor]


def bits(tensor: Tensor) -> Tensor:
    """`tensor` such that equal means equal to the bit."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@dataclass
class Layer:
    """A layer of a checkpoint: its weight's scale and zero point as they are stored, and its codes as numbers."""

    tensors: Tensors
    name: str
    spec: QuantSpec
    shape: torch.Size

    @property
    def scale(self) -> Tensor:
        return self.tensors[f"{self.name}.weight_scale"]

    @property
    def zero_point(self) -> Tensor | None:
        packed = self.tensors.get(f"{self.name}.weight_zero_point")
        return None if packed is None else unpack(packed.t().contiguous(), self.spec.dtype, self.shape[0]).t().float()

    @property
    def codes(self) -> Tensor:
        if (whole := self.tensors.get(f"{self.name}.weight")) is not None:
            return whole.float()
        return unpack(self.tensors[f"{self.name}.weight_packed"], self.spec.dtype, self.shape[1]).float()

    def error(self, weight: Tensor) -> float:
        zero_point = 0 if self.zero_point is None else self.each(self.zero_point)
        return float(((self.codes - zero_point) * self.each(self.scale.float()) - weight.float()).square().sum())

    def each(self, value: Tensor) -> Tensor:
        """A scale or zero point of each weight."""
        return spread(value, self.shape)


def spread(value: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` in which each element of `value` fills its part."""
    for dim, size in enumerate(shape):
        value = value.repeat_interleave(-(-size // value.shape[dim]), dim)
    return value


def tiles(weight: Tensor, spec: QuantSpec) -> Tensor:
    """What shares a scale, in the last dimension."""
    if spec.granularity == "block":
        return weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, spec.group_size or weight.shape[1]))


def rounded(steps: Tensor, spec: QuantSpec) -> Tensor:
    """`steps` on the grid, in the arithmetic of their dtype."""
    if spec.dtype.kind != "int":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return steps.round().clamp(spec.dtype.qmin, spec.dtype.qmax).float()


def bytes_of(tensors: Tensors, name: str) -> Tensor:
    """The codes of a layer as they are stored."""
    packed = tensors.get(f"{name}.weight_packed")
    return bits(tensors[f"{name}.weight"]) if packed is None else packed


def as_bytes(qparams: QParams, weight: Tensor) -> Tensor:
    """The codes of `weight` as they are stored: two of 4 bits in a byte, the first in its low half."""
    codes = qparams.quantize(weight)
    return codes if qparams.spec.dtype == dtype_named("fp8_e4m3") else codes[:, 0::2] | (codes[:, 1::2] << 4)
