"""The kernel for fp8 weights with fp8 activations (FP8, FP8_DYNAMIC)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from wrapq.runtime.activations import ActivationQuantizer
from wrapq.runtime.kernel import KERNELS, Kernel, finished, is_not, not_by_row, scale_by_row

if TYPE_CHECKING:
    from wrapq.runtime.module import QuantizedWeight

_MULTIPLE = 16


@KERNELS.register("fp8_mm")
class FP8MM(Kernel):
    """`torch._scaled_mm` with scales of one, so that both scales can be applied to float32 sums."""

    name = "fp8_mm"
    arithmetic = "fp8 x fp8 summed in float32, then scaled in float32"

    @classmethod
    def unsupported(cls, module: QuantizedWeight) -> str | None:
        """See `Kernel.unsupported`."""
        if reason := is_not("Linear", module):
            return reason
        spec, (rows, columns) = module.specs["weight"], module.matrix_shape
        if spec.dtype.name != "fp8_e4m3" or spec.scale_dtype != "float32" or spec.global_scale:
            return f"weight {spec} is not fp8_e4m3 with float32 scales"
        if reason := not_by_row(spec) or ActivationQuantizer.unsupported(module.specs.get("input"), "float"):
            return reason
        if rows % _MULTIPLE or columns % _MULTIPLE:
            return f"{rows} x {columns} are not multiples of {_MULTIPLE}"
        device = module.weight_device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "fp8 needs compute capability 8.9"
        return None if device.type in ("cpu", "cuda") else f"not for {device.type}"

    def __init__(self, module: QuantizedWeight) -> None:
        self.weight = module.codes().view(torch.float8_e4m3fn).contiguous()
        self.scale, self.one = scale_by_row(module), torch.ones((), device=self.weight.device)
        self.bias, self.activation = module.bias, cast(ActivationQuantizer, ActivationQuantizer.of(module))

    def run(self, x: Tensor) -> Tensor:
        """See `Kernel.run`."""
        a = self.activation(x)
        y = torch._scaled_mm(a.q, self.weight.t(), self.one, self.one, out_dtype=torch.float32)
        return finished(y.mul_(self.scale).mul_(a.scale), self.bias, x)

    def codes(self) -> Tensor:
        """See `Kernel.codes`."""
        return self.weight.view(torch.uint8)
