"""Where a leaf module keeps what it multiplies its input with: which parameter, along which axis its channels lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wrapq.wrappers.registry import WRAPPERS


@dataclass(frozen=True)
class Slot:
    """A parameter of a module, and the axes of it along which channels lie.

    Attributes:
        parameter: its name.
        rows: the axis of the channels that come out.
        columns: the axis of the channels that go in; None where the input is an index or meets the rows one by one.
        bias: the name of the parameter that is added, which may be None in the module.
    """

    parameter: str
    rows: int
    columns: int | None
    bias: str | None = None


@dataclass(frozen=True)
class Leaf:
    """A module that is one operation to those who follow tensors through a model.

    Attributes:
        kind: `linear`, `conv`, `embedding`, `norm`, `router` or `experts`.
        writes: the parameter whose rows are the channels of the output; None where nothing of ours makes them.
        reads: the parameter whose columns meet the channels of the input; None where it does not multiply them.
        opaque: what runs inside depends on data, so that only its inputs and output can be followed.
        centered: a norm that takes the mean of its input away.
    """

    kind: str
    writes: Slot | None
    reads: Slot | None
    opaque: bool = False
    centered: bool = False

    @property
    def channel_axis(self) -> int:
        """The axis of its input and output along which channels lie."""
        return 1 if self.kind == "conv" else -1


_LINEAR = Slot("weight", 0, 1, "bias")
_CONV1D = Slot("weight", 1, 0, "bias")
_NORM = Slot("weight", 0, None, "bias")
_EMBEDDING = Slot("weight", 1, None)
_ROUTER = Slot("weight", 0, 1, "bias")


def find_leaf(module: nn.Module) -> Leaf | None:
    """What `module` is as one operation; None for one that is looked into."""
    if getattr(module, "down_proj", None) is not None and isinstance(module.down_proj, nn.Parameter):
        return _experts(module)
    wrapper = WRAPPERS.find(module)
    kind = wrapper.kind if wrapper else ""
    weight = module._parameters.get("weight")
    if kind == "Linear":
        slot = _CONV1D if wrapper is not None and wrapper.__name__ == "Conv1D" else _LINEAR
        return Leaf("linear", slot, slot)
    if kind == "Conv":
        whole = getattr(module, "groups", 1) == 1
        return Leaf("conv", _LINEAR, _LINEAR if whole else None)
    if kind == "Embedding":
        return Leaf("embedding", _EMBEDDING, None)
    if kind in ("LayerNorm", "RMSNorm"):
        writes = _NORM if weight is not None and weight.dim() == 1 else None
        return Leaf("norm", writes, None, centered=kind == "LayerNorm")
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
