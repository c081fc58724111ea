"""A kernel for quantized tables: only the rows that are looked up are dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from wrapq.quant.packing import unpack
from wrapq.quant.qparams import QParams
from wrapq.runtime.kernel import KERNELS, Kernel, has_plain_scales, is_not

if TYPE_CHECKING:
    from wrapq.runtime.module import QuantizedWeight


@KERNELS.register("embedding_rows")
class EmbeddingRows(Kernel):
    """Look up packed rows and their scales, then dequantize: to the bit what looking up dequantized rows gives."""

    name = "embedding_rows"
    arithmetic = "that of the reference"
    holds_weight = False  # it reads the module's own packed rows

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        spec = module.specs["weight"]
        if reason := is_not("Embedding", module):
            return reason
        if module.max_norm is not None:
            return "max_norm changes the table"
        if spec.granularity not in ("tensor", "channel", "group") or spec.axis not in (0, -2, None):
            return f"weight {spec}: scales run across rows"
        return None if has_plain_scales(spec) else f"weight {spec}: scales are not plain float32"

    def __init__(self, module: QuantizedWeight) -> None:
        self.packed, self.columns, self.dtype = module.weight_packed, module.weight_columns, module.weight_dtype
        self.qparams = module.qparams("weight")

    def run(self, x: Tensor) -> Tensor:
        ids, parameters = x.reshape(-1), self.qparams
        spec, scale, zero_point = parameters.spec, parameters.scale.detach(), parameters.zero_point
        if spec.granularity != "tensor":
            scale = scale[ids]
            zero_point = None if zero_point is None else zero_point[ids]
        integers = unpack(self.packed[ids], spec.dtype, self.columns)
        rows = QParams(spec, scale, zero_point, parameters.permutation).dequantize(integers, self.dtype)
        return rows.view(*x.shape, self.columns)

    def codes(self) -> Tensor:
        return unpack(self.packed, self.qparams.spec.dtype, self.columns)
