"""GPTQ's layout, which GPTQModel writes and transformers, vLLM and SGLang read.

A layer [N, K] with G groups stores `qweight` int32 [K * bits / 32, N], its codes packed along the inputs; `qzeros`
int32 [G, N * bits / 32], its zero points packed along the outputs; `scales` float16 [G, N]; and `g_idx` int32 [K], the
group of each input. The format is AutoGPTQ's, as read in GPTQModel 7.6 (`nn_modules/qlinear/__init__.py`), optimum 2.3
(`gptq/quantizer.py`) and vLLM 0.32 (`model_executor/layers/quantization/auto_gptq.py`).

Of its two versions the first, `gptq`, stores zero points minus one, so that it has no place for a zero point of zero;
every reader knows it. It is written where all weights are symmetric and each zero point is the middle of the grid.
Asymmetric weights are written in the second, `gptq_v2`, which stores zero points as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from wrapq.export.base import EXPORTERS
from wrapq.export.int32_layout import (
    TILE,
    Int32Layout,
    PackedWeight,
    float_layers,
    group_size_of,
    is_symmetric,
    unsigned,
    whole_words,
)
from wrapq.quant.packing import pack
from wrapq.resolve.plan import Plan
from wrapq.wrappers.fused_layers import siblings

_VLLM_BITS = (4, 8)
_FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""What SGLang and vLLM call the layer that they make of the one of this name and of those beside it."""


@EXPORTERS.register("gptq")
class GptqLayout(Int32Layout):
    """Exporter of GPTQ's layout."""

    layout: ClassVar[str] = "GPTQ's layout"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    group_sizes: ClassVar[tuple[int, ...]] = (-1, 32, 64, 128, 256, 512, 1024)
    extra: ClassVar[tuple[str, tuple[str, ...]]] = "gptq", ("gptqmodel", "optimum")

    def fits(self, bits: int, rows: int, columns: int) -> bool:
        return whole_words(rows, bits) and whole_words(columns, bits) and (bits != 4 or rows % TILE == 0)

    def tensors(self, weight: PackedWeight, bits: int, symmetric: bool) -> dict[str, Tensor]:
        grid = unsigned(bits)
        return {
            "qweight": pack(weight.codes.t().contiguous(), grid).t().contiguous(),
            "qzeros": pack(weight.zeros - int(symmetric), grid),
            "scales": weight.scales,
            "g_idx": weight.groups,
        }

    def quantization_config(self, model: nn.Module, plan: Plan, weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
        spec, symmetric = plan.modules[0].points[0].quant_spec, is_symmetric(plan)
        section = {
            "quant_method": "gptq",
            "bits": spec.dtype.bits,
            "group_size": group_size_of(spec),
            "sym": symmetric,
            "desc_act": any(weight.ordered for weight in weights.values()),
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "block_name_to_quantize": plan.model.blocks,
        }
        if floats := _left_float(model, plan, weights):
            section["modules_in_block_to_quantize"] = [list(weights)]  # read by transformers and vLLM
            section["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in floats}  # by GPTQModel and SGLang
        return section

    def notes(self, plan: Plan) -> Iterable[str]:
        yield from super().notes(plan)
        if not is_symmetric(plan) or plan.modules[0].points[0].quant_spec.dtype.bits not in _VLLM_BITS:
            yield "vLLM reads this layout with symmetric weights of 4 or 8 bits; export=awq holds asymmetric ones of 4"


def _left_float(model: nn.Module, plan: Plan, weights: Mapping[str, PackedWeight]) -> list[str]:
    """The layers that readers would otherwise take for quantized ones, and what those that they fuse are called."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Conv2d, Conv1D)  # which optimum takes for layers
    found = [name for name in float_layers(model, kinds, weights) if name.startswith(plan.model.blocks)]
    fused = []
    for name in found:
        parent, dot, own = name.rpartition(".")
        if own in _FUSED and {*siblings(name)} <= {*found}:
            fused.append(f"{parent}{dot}{_FUSED[own]}")
    return [*found, *fused]
