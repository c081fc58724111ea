"""Where a leaf module keeps what it multiplies its input with: which parameter, along which axis its channels lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from wrapq.calibration.batch_norm import is_affine
from wrapq.wrappers.registry import WRAPPERS


@dataclass(frozen=True)
class Slot:
    """A parameter of a module, and the axes of it along which channels lie.

    Attributes:
        parameter: its name.
        rows: the axis of the channels that come out.
        columns: the axis of the channels that go in; None where the input is an index or meets the rows one by one.
        bias: the name of the parameter that is added, which may be None in the module.
        groups: of a convolution, whose weight [N, K / G, ...] has rows for one group of channels each.
    """

    parameter: str
    rows: int
    columns: int | None
    bias: str | None = None
    groups: int = 1

    def width(self, weight: Tensor) -> int:
        """How many channels [K] go in."""
        return 0 if self.columns is None else weight.shape[self.columns] * self.groups

    def by_column(self, weight: Tensor) -> Tensor:
        """`weight` as [R, K]: for each channel that goes in all that it is multiplied with."""
        if self.groups == 1:
            columns = weight.movedim(int(self.columns or 0), -1)
        else:  # [G, N / G, K / G, ...] to [N / G, ..., G, K / G]
            columns = weight.unflatten(0, (self.groups, -1)).movedim((0, 2), (-2, -1)).flatten(-2)
        return columns.reshape(-1, columns.shape[-1])

    def along_columns(self, values: Tensor, weight: Tensor) -> Tensor:
        """`values` [K], one for each channel that goes in, in a shape that multiplies `weight`."""
        shape, columns = [1] * weight.dim(), int(self.columns or 0)
        shape[columns] = weight.shape[columns]
        if self.groups > 1:
            shape[0] = len(weight)
            values = values.reshape(self.groups, -1).repeat_interleave(len(weight) // self.groups, 0)
        return values.reshape(shape)


@dataclass(frozen=True)
class Leaf:
    """A module that is one operation to those who follow tensors through a model.

    Attributes:
        kind: `linear`, `conv`, `embedding`, `norm`, `batch_norm`, `router` or `experts`.
        writes: the parameter whose rows are the channels of the output; None where nothing of ours makes them.
        reads: the parameter whose columns meet the channels of the input; None where it does not multiply them.
        opaque: what runs inside depends on data, so that only its inputs and output can be followed.
        centered: a norm that takes the mean of its input away.
        pads: zeros come beside its input, to which nothing that is added to that input is added.
    """

    kind: str
    writes: Slot | None
    reads: Slot | None
    opaque: bool = False
    centered: bool = False
    pads: bool = False

    @property
    def channel_axis(self) -> int:
        """The axis of its input and output along which channels lie."""
        return 1 if self.kind in ("conv", "batch_norm") else -1


_LINEAR = Slot("weight", 0, 1, "bias")
_CONV1D = Slot("weight", 1, 0, "bias")
_NORM = Slot("weight", 0, None, "bias")
_EMBEDDING = Slot("weight", 1, None)
_ROUTER = Slot("weight", 0, 1, "bias")


def find_leaf(module: Any) -> Leaf | None:
    """What `module` is as one operation; None for one that is looked into."""
    if getattr(module, "down_proj", None) is not None and isinstance(module.down_proj, nn.Parameter):
        return _experts(module)
    wrapper = WRAPPERS.find(module)
    kind = wrapper.kind if wrapper else ""
    weight = module._parameters.get("weight")
    if kind in ("Linear", "Conv") and weight is None:  # it is computed from others, as by a weight normalization
        return Leaf(kind.lower(), None, None)
    if kind == "Linear":
        slot = _CONV1D if wrapper is not None and wrapper.__name__ == "Conv1D" else _LINEAR
        return Leaf("linear", slot, slot)
    if kind == "Conv":
        slot = replace(_LINEAR, groups=module.groups)
        pads = module.padding_mode == "zeros" and module.padding != "valid" and any(module.padding)
        return Leaf("conv", slot, slot, pads=pads)
    if kind == "Embedding":
        return Leaf("embedding", _EMBEDDING, None)
    if kind in ("LayerNorm", "RMSNorm"):
        writes = _NORM if weight is not None and weight.dim() == 1 else None
        return Leaf("norm", writes, None, centered=kind == "LayerNorm")
    if is_affine(module):
        return Leaf("batch_norm", _NORM, None)
    if wrapper is None and weight is not None and weight.dim() == 2 and "outer" in type(module).__name__:
        return Leaf("router", None, _ROUTER)
    return None


def _experts(module: Any) -> Leaf:
    """transformers' experts: three-dimensional weights [E, N, K], or [E, K, N] in the families that transpose them."""
    rows, columns = (2, 1) if getattr(module, "is_transposed", False) else (1, 2)
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    return Leaf(
        "experts",
        Slot("down_proj", rows, columns, "down_proj_bias"),
        Slot(first, rows, columns, f"{first}_bias"),
        opaque=True,
    )
