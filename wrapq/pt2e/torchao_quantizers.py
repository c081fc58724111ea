"""The quantizers that come with torchao."""

from __future__ import annotations

import warnings
from typing import Any

from pydantic import Field

from wrapq.pt2e.base import GRAPH_QUANTIZERS, GraphQuantizer
from wrapq.registry import Options


class RangeOptions(Options):
    """Options of quantizers that find ranges in two ways."""

    dynamic: bool = Field(False, description="Ranges of inputs are found in each forward; else calibration fixes them.")


class XnnpackOptions(RangeOptions):
    """Options of XNNPACK's."""

    per_channel: bool = Field(True, description="A scale for each output channel of a weight, not one for all.")


class X86Options(RangeOptions):
    """Options of x86 CPUs'."""

    reduce_range: bool = Field(False, description="Inputs in 7 bits, for CPUs without VNNI, which sum in 16.")


@GRAPH_QUANTIZERS.register("xnnpack")
class Xnnpack(GraphQuantizer):
    """8 bits, weights symmetric, as XNNPACK multiplies them: `XNNPACKQuantizer`."""

    Options = XnnpackOptions
    options: XnnpackOptions

    def make(self) -> Any:
        from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

        per_channel, dynamic = self.options.per_channel, self.options.dynamic
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated for ExecuTorch's own, which is the same
            config = xnnpack.get_symmetric_quantization_config(per_channel, is_dynamic=dynamic)
            return xnnpack.XNNPACKQuantizer().set_global(config)


@GRAPH_QUANTIZERS.register("x86_inductor")
class X86Inductor(GraphQuantizer):
    """8 bits, weights by channel, as Inductor compiles them for x86 CPUs: `X86InductorQuantizer`."""

    Options = X86Options
    options: X86Options

    def make(self) -> Any:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        reduce, dynamic = self.options.reduce_range, self.options.dynamic
        config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic, reduce_range=reduce)
        return x86.X86InductorQuantizer().set_global(config)


@GRAPH_QUANTIZERS.register("arm_inductor")
class ArmInductor(GraphQuantizer):
    """8 bits, weights by channel, as Inductor compiles them for Arm CPUs: `ArmInductorQuantizer`."""

    Options = RangeOptions
    options: RangeOptions

    def make(self) -> Any:
        from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm

        config = arm.get_default_arm_inductor_quantization_config(is_dynamic=self.options.dynamic)
        return arm.ArmInductorQuantizer().set_global(config)


@GRAPH_QUANTIZERS.register("embedding")
class EmbeddingTable(GraphQuantizer):
    """Tables of embeddings in 8 bits, by row: `EmbeddingQuantizer`."""

    def make(self) -> Any:
        from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer

        return EmbeddingQuantizer()
