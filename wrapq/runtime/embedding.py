"""A kernel for quantized tables: only the rows that are looked up are dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from wrapq.quant.packing import unpack
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
        ids = x.reshape(-1)
        integers = unpack(self.packed[ids], self.qparams.spec.dtype, self.columns)
        return self.qparams.of_rows(ids).dequantize(integers, self.dtype).view(*x.shape, self.columns)

    def codes(self) -> Tensor:
        return unpack(self.packed, self.qparams.spec.dtype, self.columns)
