"""The module that remains after `convert`: plain tensors, integers and parameters, in a stand-in for the original."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wrapq.quant.affine import dynamic_fake_quantize
from wrapq.quant.packing import pack, unpack
from wrapq.quant.qparams import STORED_PARTS, QParams
from wrapq.quant.spec import QuantSpec
from wrapq.quant.straight_through import straight_through
from wrapq.runtime.kernel import Kernel
from wrapq.runtime.prefix import current_prefix, outside_prefix
from wrapq.runtime.stand_in import WITHOUT, combined_class, shadow

_log = logging.getLogger(__name__)

_PARTS = ("packed", "shape", *STORED_PARTS)
"""What a point's tensors are called after the point."""


class QuantizedModule(nn.Module):
    """Base of converted modules: plain tensors under compressed-tensors' names, no observers.

    It holds, for each point with fixed parameters, `<point>_scale` and, where it has one, `<point>_zero_point`. Dynamic
    points need no tensor. `half()` or `to(dtype)` changes what is computed in, and leaves these tensors as they are.
    """

    specs: dict[str, QuantSpec]
    wrapper: Any

    def q(self, point: str, x: Tensor, token_dim: int = 1) -> Tensor:
        """`x` [..., K] as the point's grid holds it, or `x` itself where the point is not quantized."""
        spec = self.specs.get(point)
        if spec is None:
            return x
        quantize = partial(dynamic_fake_quantize, spec=spec) if spec.dynamic else self.qparams(point).fake_quantize
        return straight_through(x, partial(outside_prefix, quantize=quantize, token_dim=token_dim))

    def repaired(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, what the weight made of `x`, with what `weight_lora_a` and `weight_lora_b` make of it, if any."""
        a, b = (self._parameters.get(name) for name in ("weight_lora_a", "weight_lora_b"))
        return y if a is None or b is None else add_low_rank(x, y, a, b)

    def qparams(self, point: str) -> QParams:
        """The fixed parameters of `point`."""
        tensors = {**self._buffers, **self._parameters}
        return QParams.from_tensors(point, cast(dict[str, Tensor], tensors), self.specs[point])

    def set_qparams(self, point: str, qparams: QParams) -> None:
        """Hold the fixed parameters of `point`."""
        for name, tensor in qparams.tensors(point).items():
            if tensor.is_floating_point():
                # transformers asks a model's parameters for its device: one without a single parameter cannot generate
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        tables = {**self._buffers, **self._parameters}
        own = {id(tables.get(f"{point}_{part}")) for point in self.specs for part in _PARTS}

        def apply(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if id(tensor) not in own or changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{point}={spec}" for point, spec in self.specs.items())


class QuantizedWeight(QuantizedModule):
    """A converted module whose weight is quantized: packed integers instead of the float weight.

    It holds `weight_packed` int32 [N, ceil(K * bits / 32)] and `weight_shape` int64 [2] = (N, K). Without a kernel the
    weight is dequantized at each forward. With one (`use_kernel`), the kernel's layout is made at the first forward and
    takes the place of `weight_packed` in memory; state dicts, copies and pickles hold `weight_packed` all the same, and
    moving or loading the module forgets the layout until the next forward.
    """

    weight_packed: Tensor
    weight_layout: torch.Size
    weight_dtype: torch.dtype
    weight_columns: int
    kernel_type: type[Kernel] | None = None
    """The kernel that runs; None for the reference."""
    keeps_packed: bool = False
    """Other modules hold the same `weight_packed`: it stays although the kernel has its own layout."""
    _kernel: Kernel | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_layout.numel() // self.weight_columns, self.weight_columns

    @property
    def weight_device(self) -> torch.device:
        """Where the weight lies."""
        return cast(Tensor, self.weight_scale).device

    @property
    def weight(self) -> Tensor:
        """The weight in the original module's layout and dtype, dequantized anew at each call."""
        if WITHOUT in self.__dict__:
            return torch.empty(self.weight_layout, dtype=self.weight_dtype, device="meta")
        matrix = self.qparams("weight").dequantize(self.codes(), self.weight_dtype)
        return self.wrapper.from_matrix(matrix, self.weight_layout)

    def weight_rows(self, ids: Tensor) -> Tensor:
        """The rows [M, K] of the weight for `ids` [M], to the bit."""
        if (packed := self._buffers.get("weight_packed")) is None:
            codes = self.codes().index_select(0, ids)
        else:
            codes = unpack(packed.index_select(0, ids), self.specs["weight"].dtype, self.weight_columns)
        return self.qparams("weight").of_rows(ids).dequantize(codes, self.weight_dtype)

    def codes(self) -> Tensor:
        """The integers [N, K] of the weight."""
        packed = self._buffers.get("weight_packed")
        if packed is None and self._kernel is not None:
            return self._kernel.codes()
        return unpack(cast(Tensor, packed), self.specs["weight"].dtype, self.weight_columns)

    def set_weight(self, integers: Tensor, qparams: QParams) -> None:
        """Hold `integers` [N, K] and their parameters as the weight."""
        self.register_buffer("weight_packed", pack(integers, qparams.spec.dtype))
        self.register_buffer("weight_shape", torch.tensor(integers.shape))
        self.set_qparams("weight", qparams)

    def set_correction(self, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> None:
        """Add `bias` [N] to the module's own; hold `a` [r, K] and `b` [N, r] as `weight_lora_a` and `weight_lora_b`."""
        new = {} if bias is None else {"bias": added_bias(self._parameters.get("bias"), bias, self.weight)}
        new |= {} if a is None or b is None else {"weight_lora_a": a, "weight_lora_b": b}
        for name, tensor in new.items():
            self.register_parameter(name, nn.Parameter(tensor.to(self.weight_dtype), requires_grad=False))

    def share_weight(self, other: QuantizedModule) -> None:
        """Hold the very tensors of `other`, so that tied weights stay tied."""
        tables: Any = ((self._buffers, other._buffers), (self._parameters, other._parameters))
        for table, theirs in tables:
            table.update({name: tensor for name, tensor in theirs.items() if name.startswith("weight_")})

    def use_kernel(self, kernel: type[Kernel] | None) -> None:
        """Compute with `kernel` from the next forward on, or with the reference for None."""
        self.forget_kernel()
        self.kernel_type = kernel

    def forget_kernel(self) -> None:
        """Give up the kernel's layout and hold `weight_packed` again; the next forward makes the layout anew."""
        if self._kernel is not None:
            self._buffers["weight_packed"], self._kernel = self._packed(), None

    def kernel(self) -> Kernel | None:
        """The kernel, ready to run; None for the reference, also where it does not run, which the log then says."""
        if self._kernel is None and self.kernel_type is not None:
            if reason := self.kernel_type.unsupported(self):
                _log.warning("kernel %s left for the reference: %s", self.kernel_type.name, reason)
                self.kernel_type = None
                return None
            self._kernel = self.kernel_type(self)
            if self._kernel.holds_weight and not self.keeps_packed:
                self._buffers["weight_packed"] = None
        return self._kernel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapper computes, by the kernel where there is one; kernels have no gradient."""
        if self.kernel_type is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        (x,) = args
        learns, prefix = x.requires_grad and torch.is_grad_enabled(), current_prefix()
        if not x.numel() or learns or (prefix is not None and prefix.runs) or (kernel := self.kernel()) is None:
            return super().forward(x)
        y = kernel.run(x)
        if "weight_lora_a" in self._parameters:
            y = self.repaired(self.q("input", x), y)
        return self.q("output", y)

    def _packed(self) -> Tensor | None:
        packed = self._buffers.get("weight_packed")
        if packed is None and self._kernel is not None:
            return pack(self._kernel.codes(), self.specs["weight"].dtype)
        return packed

    def __getattr__(self, name: str) -> Any:
        taken = name == "weight_packed" and self.__dict__.get("_kernel") is not None
        return self._packed() if taken else super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        if self._kernel is None:
            return self.__dict__.copy()
        return {**self.__dict__, "_kernel": None, "_buffers": {**self._buffers, "weight_packed": self._packed()}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        self.forget_kernel()
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_device)).dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = self._buffers
        if self._kernel is not None:
            self._buffers = {**kept, "weight_packed": self._packed()}
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._buffers = kept
        for name in (key for key in destination if key.startswith(f"{prefix}weight_")):
            destination[name] = destination[name].contiguous()  # a kernel may hold scales in another order

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget_kernel()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.kernel_type is None else f", kernel={self.kernel_type.name}")


def added_bias(bias: Tensor | None, more: Tensor, like: Tensor) -> Tensor:
    """`bias` [N], None for zero, plus `more` [N], in the dtype of the weight `like`."""
    return (more if bias is None else bias.float() + more).to(like.dtype)


def add_low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y + (x A^T) B^T` for `x` [..., K], `y` [..., N], `a` [r, K] and `b` [N, r], which are never multiplied with each
    other."""
    return y + linear(linear(x, a), b)


def new_quantized(module: nn.Module, wrapper: Any, specs: Mapping[str, QuantSpec]) -> Any:
    """A stand-in for the float `module`, which is not changed, without integers or parameters yet: the forward of the
    class `wrapper` runs, with the spec of every quantized point."""
    base = QuantizedWeight if "weight" in specs else QuantizedModule
    new = shadow(module, combined_class("Quantized", base, wrapper, type(module), beneath=wrapper.beneath))
    new.__dict__["specs"], new.__dict__["wrapper"] = dict(specs), wrapper
    if "weight" in specs:
        weight = new._parameters.pop("weight")
        new.weight_layout, new.weight_dtype = weight.shape, weight.dtype
        new.weight_columns = wrapper.to_matrix(weight).shape[1]
    return new
