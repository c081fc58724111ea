"""Modules that count as one operation, and which axis of their weight is the input and which the output channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from wrapq.graph.batch_norm import is_affine
from wrapq.graph.mixtures import is_fused_experts, is_router
from wrapq.wrappers.experts import is_transposed
from wrapq.wrappers.leaf import Conv
from wrapq.wrappers.wrapper_registry import WRAPPERS


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """`values` [N] as a tensor of so many dimensions, along one `axis`."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


@dataclass(frozen=True)
class WeightLayout:
    """A weight of a layer and the axes of its channels.

    Attributes:
        parameter: the weight's name in the module.
        out_axis: the axis of the output channels.
        in_axis: the axis of the input channels; of an embedding that of the tokens, of a norm the same as `out_axis`.
        bias: the name of the bias that belongs to it; the module may hold None there.
        groups: of a convolution, whose weight [N, K / G, ...] has the input channels of one group only.
    """

    parameter: str
    out_axis: int
    in_axis: int
    bias: str | None = None
    groups: int = 1

    def width(self, weight: Tensor) -> int:
        """The number of input channels [K]."""
        return weight.shape[self.in_axis] * self.groups

    def outputs(self, module: nn.Module) -> list[tuple[str, int]]:
        """The parameters with an element for each output channel that `module` holds, and the axis of these."""
        held = module._parameters.get(self.bias or "") is not None
        return [(self.parameter, self.out_axis), *([(str(self.bias), -1)] if held else [])]

    def by_input_channel(self, weight: Tensor) -> Tensor:
        """`weight` as [R, K]: all elements that multiply an input channel in one column."""
        if self.groups == 1:
            columns = weight.movedim(self.in_axis, -1)
        else:  # [G, N / G, K / G, ...] to [N / G, ..., G, K / G]
            columns = weight.unflatten(0, (self.groups, -1)).movedim((0, 2), (-2, -1)).flatten(-2)
        return columns.reshape(-1, columns.shape[-1])

    def broadcast_input(self, values: Tensor, weight: Tensor) -> Tensor:
        """`values` [K], one for each input channel, in a shape that broadcasts against `weight`."""
        if self.groups == 1:
            return along(values, self.in_axis, weight.dim())
        by_row = values.reshape(self.groups, -1).repeat_interleave(len(weight) // self.groups, 0)
        return by_row.reshape(*by_row.shape, *[1] * (weight.dim() - 2))


@dataclass(frozen=True)
class LayerInfo:
    """A module that the channel tracer treats as one operation.

    Attributes:
        kind: `linear`, `conv`, `embedding`, `norm`, `batch_norm`, `router` or `experts`.
        produces: the weight whose output channels are those of the layer; None where the layer has no such weight.
        consumes: the weight that multiplies the layer's input channels; None where there is none.
        opaque: its forward depends on data, so that the tracer replaces it by one that returns an empty output.
        centered: a norm that subtracts the mean, as LayerNorm does.
        pads: a convolution that pads with zeros, or may, so that a constant in its input is none in its output.
    """

    kind: str
    produces: WeightLayout | None
    consumes: WeightLayout | None
    opaque: bool = False
    centered: bool = False
    pads: bool = False

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the layer's input and output."""
        return 1 if self.kind in ("conv", "batch_norm") else -1


_LINEAR = WeightLayout("weight", 0, 1, "bias")
_CONV1D = WeightLayout("weight", 1, 0, "bias")
_NORM = WeightLayout("weight", 0, 0, "bias")
_EMBEDDING = WeightLayout("weight", 1, 0)


def layer_info(module: Any) -> LayerInfo | None:
    """The layer that `module` is; None for a module whose forward is traced operation by operation."""
    if is_fused_experts(module):
        return _experts(module)
    wrapper = WRAPPERS.find(module)
    kind = wrapper.kind if wrapper else ""
    weight = module._parameters.get("weight")
    if kind in ("Linear", "Conv") and weight is None:  # it is computed from others, as by a weight normalization
        return LayerInfo(kind.lower(), None, None)
    if kind == "Linear":
        layout = _CONV1D if wrapper is not None and wrapper.__name__ == "Conv1D" else _LINEAR
        return LayerInfo("linear", layout, layout)
    if kind == "Conv":
        layout = replace(_LINEAR, groups=module.groups)
        pads = module.padding_mode == "zeros" and module.padding != "valid" and any(module.padding)
        pads = pads or Conv.prepares_input(module)
        return LayerInfo("conv", layout, layout, pads=pads)
    if kind == "Embedding":
        return LayerInfo("embedding", _EMBEDDING, None)
    if kind in ("LayerNorm", "RMSNorm"):
        produces = _NORM if weight is not None and weight.dim() == 1 else None
        return LayerInfo("norm", produces, None, centered=kind == "LayerNorm")
    if is_affine(module):
        return LayerInfo("batch_norm", _NORM, None)
    if wrapper is None and is_router(module):
        return LayerInfo("router", None, _LINEAR)
    return None


def _experts(module: Any) -> LayerInfo:
    """transformers' experts: three-dimensional weights [E, N, K], or [E, K, N] in the families that transpose them."""
    if (transposed := is_transposed(module)) is None:
        return LayerInfo("experts", None, None, opaque=True)
    out_axis, in_axis = (2, 1) if transposed else (1, 2)
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    return LayerInfo(
        "experts",
        WeightLayout("down_proj", out_axis, in_axis, "down_proj_bias"),
        WeightLayout(first, out_axis, in_axis, f"{first}_bias"),
        opaque=True,
    )
