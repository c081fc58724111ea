"""AWQ's layout, in AutoAWQ's version `gemm`, which transformers (through GPTQModel), vLLM and SGLang read.

A layer [N, K] with G groups stores `qweight` int32 [K, N / 8] and `qzeros` int32 [G, N / 8], codes and zero points
packed along the outputs, eight in a word in the order 0, 2, 4, 6, 1, 3, 5, 7; and `scales` float16 [G, N]. The format
is AutoAWQ's, as read in GPTQModel 7.6 (`quantization/awq/utils/packing_utils.py`), transformers 5.24
(`integrations/awq.py`) and vLLM 0.32 (`model_executor/layers/quantization/auto_awq.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.export.base import EXPORTERS
from wrapq.export.int32_layout import TILE, Int32Layout, PackedWeight, float_layers, group_size_of, unsigned
from wrapq.quant.packing import pack
from wrapq.resolve.plan import Plan

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs each four bits of a word hold, from the lowest on."""


@EXPORTERS.register("awq")
class AwqLayout(Int32Layout):
    """Exporter of AWQ's layout."""

    layout: ClassVar[str] = "AWQ's layout"
    bits: ClassVar[tuple[int, ...]] = (4,)
    group_sizes: ClassVar[tuple[int, ...]] = (-1, 32, 64, 128)
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "gptq", ("gptqmodel", "accelerate")

    def fits(self, bits: int, rows: int, columns: int) -> bool:
        return rows % TILE == 0

    def tensors(self, weight: PackedWeight, bits: int, symmetric: bool) -> dict[str, Tensor]:
        return {"qweight": _words(weight.codes), "qzeros": _words(weight.zeros), "scales": weight.scales}

    def quantization_config(self, model: nn.Module, plan: Plan, weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
        if ordered := [name for name, weight in weights.items() if weight.ordered]:
            what = "has no place for groups that follow an activation order, which export=gptq has"
            raise ModelError(f"{ordered[0]}: {self.layout} {what}")
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size_of(plan.modules[0].points[0].quant_spec),
            "zero_point": True,  # also of symmetric weights, whose zero points are the middle of the grid
            "modules_to_not_convert": list(float_layers(model, (nn.Linear,), weights)),
        }


def _words(values: Tensor) -> Tensor:
    """`values` [R, N] of 4 bits as int32 [R, N / 8]."""
    return pack(values.unflatten(1, (-1, len(_ORDER)))[..., _ORDER].flatten(1), unsigned(4))
