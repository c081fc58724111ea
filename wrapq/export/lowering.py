"""One lowering for every runtime: a converted model in the operators for quantized tensors that exporters know.

A converted module computes with wrapq's own arithmetic. What is lowered, at the same place in the model, computes the
same in `torch.ops.quantized_decomposed`, for scales of whole tensors and of channels, and in `torch.ops.torchao`, for
groups, blocks, the ranges of each token and floats of 8 bits. `torch.export` keeps these as they are, and compilers
match them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wrapq.quant.affine import TINY, storage_dtype
from wrapq.quant.casts import TORCH_FLOATS
from wrapq.quant.dtypes import dtype_named
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.module import QuantizedModule, QuantizedWeight, add_low_rank
from wrapq.runtime.prefix import prefix_tokens
from wrapq.runtime.stand_in import combined_class, original_class, shadow

NEEDED = "torchao"
"""The package with the operators for groups, tokens and floats."""
_WEIGHT = ("weight_packed", "weight_shape")


def inexpressible(spec: QuantSpec, weight: bool) -> str | None:
    """What of `spec` these operators cannot say, of a weight or an activation; None where they can say all of it."""
    if spec.dtype.kind != "int" and spec.dtype.name not in TORCH_FLOATS:
        return f"there are operators for integers and fp8, not for {spec.dtype.name}"
    if spec.zero_point != "int":
        return "zero points are integers"
    if spec.global_scale or spec.local:
        return "a scale has no second one above it"
    if spec.granularity == "head" or (not weight and not spec.dynamic and spec.granularity in ("group", "block")):
        return f"an activation has no fixed scales by {spec.granularity}"
    if spec.dynamic and spec.granularity == "block":
        return "tokens come in any number, not in whole blocks"
    if spec.dynamic and spec.scale_dtype != "float32":
        return f"scales found as tokens come are float32, not {spec.scale_dtype}"
    return None


def lower(model: nn.Module, unsigned: bool = False) -> nn.Module:
    """A copy of the converted `model` that computes the same in standard operators; other modules and all their tensors
    are shared, and `model` stays as it is.

    Args:
        model: the converted one.
        unsigned: put integers of at most 8 bits on the unsigned grid, codes and zero points moved up by half of it, and
            look rows up in whole tables; for what knows no other grid, and no integers of single rows.

    Raises:
        ValueError: a point is `inexpressible`, or a float prefix, which no operator knows.
    """
    import torchao  # noqa: F401 - which registers the operators

    if prefix_tokens(model):
        raise ValueError("a float prefix is kept by hooks, which no operator says")
    return _copied(model, {}, unsigned)


def in_float32(lowered: nn.Module) -> nn.Module:
    """The lowered model itself, or a copy of it in float32: runtimes have few kernels for shorter types on a CPU."""

    def other(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype not in (torch.float32, *TORCH_FLOATS.values())

    made = {m.weight_dtype for m in lowered.modules() if isinstance(m, Lowered) and "weight_dtype" in m.__dict__}
    if not any(map(other, (*lowered.parameters(), *lowered.buffers()))) and made <= {torch.float32}:
        return lowered
    wide = copy.deepcopy(lowered)._apply(lambda tensor: tensor.float() if other(tensor) else tensor)
    for module in wide.modules():
        if isinstance(module, Lowered):
            module.weight_dtype = torch.float32
    return wide


def _copied(module: nn.Module, made: dict[nn.Module, nn.Module], unsigned: bool) -> nn.Module:
    """`module` itself where nothing in it is quantized; one for all places at which a module stands."""
    if module not in made:
        children = {
            name: _copied(child, made, unsigned) for name, child in module._modules.items() if child is not None
        }
        new = _lowered(module, unsigned) if isinstance(module, QuantizedModule) else module
        if new is module and any(child is not module._modules[name] for name, child in children.items()):
            new = shadow(module, type(module))
        if new is not module:
            new._modules.update(children)
        made[module] = new
    return made[module]


def _lowered(module: QuantizedModule, unsigned: bool) -> nn.Module:
    wrapper, original = module.wrapper, original_class(module)
    new = shadow(module, combined_class("Lowered", Lowered, wrapper, original, beneath=wrapper.beneath))
    new.__dict__["fixed"], new.__dict__["specs"], new.__dict__["whole"] = {}, dict(module.specs), unsigned
    for point, spec in module.specs.items():
        if reason := inexpressible(spec, point == "weight"):
            raise ValueError(f"{type(module).__name__}.{point}: {reason}")
        if spec.dynamic:
            continue
        qparams = module.qparams(point)
        for name in (*qparams.tensors(point), *(_WEIGHT if point == "weight" else ())):
            (new._parameters if name in new._parameters else new._buffers).pop(name)
        up = 0
        if unsigned and spec.dtype.kind == "int" and spec.dtype.signed and spec.dtype.bits <= 8:
            up = 2 ** (spec.dtype.bits - 1)
            new.specs[point] = replace(spec, dtype=dtype_named(f"uint{spec.dtype.bits}"), symmetric=False)
        new.hold_scales(point, qparams, up)
        if point == "weight":
            new.hold_codes(cast(QuantizedWeight, module).codes(), qparams, up)
    return new


class Lowered(nn.Module):
    """A converted module in standard operators: of a quantized weight the integers, one to a byte or two, or floats of
    8 bits, and scales and zero points as tensors; of activations in integers with one scale a number each."""

    specs: dict[str, QuantSpec]
    wrapper: Any
    fixed: dict[str, tuple[float, int]]
    """Scale and zero point of each point that has one."""
    whole: bool
    """Whether rows are looked up in the whole weight."""
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_layout: torch.Size
    weight_dtype: torch.dtype
    weight_columns: int

    def hold_codes(self, codes: Tensor, qparams: QParams, up: int) -> None:
        """Hold the codes [N, K] of the weight, moved up, those of each group side by side; blocks are whole."""
        if up:
            codes = (codes.to(torch.int16) + up).to(torch.uint8)
        if qparams.permutation is not None:
            codes = torch.empty_like(codes).index_copy_(1, qparams.permutation, codes)
            self.register_buffer("weight_order", qparams.permutation)
        if qparams.spec.block_size is not None:  # whole blocks, as torchao has no others
            tall, wide = qparams.spec.block_size
            codes = pad(codes, (0, -codes.shape[1] % wide, 0, -codes.shape[0] % tall))
        kind = TORCH_FLOATS.get(qparams.spec.dtype.name, codes.dtype)
        self.register_buffer("weight_codes", codes.contiguous().view(kind))

    def hold_scales(self, point: str, qparams: QParams, up: int) -> None:
        """Hold the fixed parameters of `point`, zero points moved up."""
        scale, zero = qparams.scale.detach(), qparams.zero_point
        if qparams.spec.dtype.kind == "float":
            self.register_buffer(f"{point}_scale", scale.reshape(()) if scale.numel() == 1 else scale)
            self.register_buffer(f"{point}_zero_point", None)
            return
        zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero.to(torch.int32)
        zero = zero + up
        if scale.numel() == 1 and (point != "weight" or (self.whole and self.specs[point].granularity == "tensor")):
            self.fixed[point] = float(scale), int(zero)
        if point == "weight" or scale.numel() > 1:
            if point != "weight" or _of_channels(self.specs[point]):
                scale, zero = scale.reshape(-1), zero.reshape(-1)
            self.register_buffer(f"{point}_scale", scale)
            self.register_buffer(f"{point}_zero_point", zero)

    def q(self, point: str, x: Tensor, token_dim: int = 1) -> Tensor:
        """`x` [..., K] quantized and dequantized."""
        spec = self.specs.get(point)
        if spec is None:
            return x
        if spec.dtype.kind == "float":
            return _through_floats(x, None if spec.dynamic else self._buffers[f"{point}_scale"], spec)
        if spec.dynamic:
            return _dynamic(x, spec)
        grid = *_grid(spec), storage_dtype(spec.dtype)
        ops: Any = torch.ops.quantized_decomposed
        if point in self.fixed:
            codes = ops.quantize_per_tensor(x, *self.fixed[point], *grid)
            return _in_dtype(ops.dequantize_per_tensor(codes, *self.fixed[point], *grid), x.dtype)
        parts = (self._buffers[f"{point}_{part}"] for part in ("scale", "zero_point"))
        by_channel = (*parts, (spec.axis or 0) % x.dim(), *grid)
        codes = ops.quantize_per_channel(x, *by_channel)
        return _in_dtype(ops.dequantize_per_channel(codes, *by_channel), x.dtype)

    def on_weight_input(self, raw: Tensor, x: Tensor) -> Tensor:
        return x

    def repaired(self, x: Tensor, y: Tensor) -> Tensor:
        """As `QuantizedModule.repaired`."""
        a, b = (self._parameters.get(name) for name in ("weight_lora_a", "weight_lora_b"))
        return y if a is None or b is None else add_low_rank(x, y, a, b)

    @property
    def weight(self) -> Tensor:
        """The weight in the original module's layout and dtype."""
        if "weight_codes" not in self._buffers:
            return cast(Tensor, super().__getattr__("weight"))
        matrix = self._dequantized(self.weight_codes, self.weight_scale, self.weight_zero_point, self.specs["weight"])
        rows = self.weight_layout.numel() // self.weight_columns
        return self.wrapper.from_matrix(matrix if len(matrix) == rows else matrix[:rows], self.weight_layout)

    def weight_rows(self, ids: Tensor) -> Tensor | None:
        """The rows [M, K] of the weight for `ids` [M]; None where it is not quantized."""
        if "weight_codes" not in self._buffers or self.whole:
            return None
        spec, scale, zero, rows = self.specs["weight"], self.weight_scale, self.weight_zero_point, ids
        if spec.block_size is not None:  # each row in blocks of its own
            tall, wide = spec.block_size
            rows, spec = ids // tall, replace(spec, block_size=(1, wide))
        if scale.dim() > 0 and len(scale) > 1:  # else all rows share it
            scale, zero = scale.index_select(0, rows), None if zero is None else zero.index_select(0, rows)
        return self._dequantized(self.weight_codes.index_select(0, ids), scale, zero, spec)

    def _dequantized(self, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
        ops: Any = torch.ops.quantized_decomposed
        if spec.dtype.kind == "float":
            matrix = torch.ops.torchao.dequantize_affine_float8_non_decomposed(codes, scale)
        elif "weight" in self.fixed:
            matrix = ops.dequantize_per_tensor(codes, *self.fixed["weight"], *_grid(spec), codes.dtype)
        elif _of_channels(spec):
            matrix = ops.dequantize_per_channel(codes, scale, zero, 0, *_grid(spec), codes.dtype)
        else:
            block = _block(spec, codes)
            matrix = torch.ops.torchao.dequantize_affine(codes, block, scale, zero, codes.dtype, *_grid(spec))
        matrix = matrix if codes.shape[1] == self.weight_columns else matrix[:, : self.weight_columns]
        order = self._buffers.get("weight_order")
        matrix = matrix if order is None else matrix.index_select(1, order)
        return _in_dtype(matrix, self.weight_dtype)


def _of_channels(weight: QuantSpec) -> bool:
    """Whether each output channel has a scale."""
    return weight.granularity == "channel" and (weight.axis or 0) % 2 == 0


def _grid(spec: QuantSpec) -> tuple[int, int]:
    return spec.dtype.qmin, spec.dtype.qmax


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A conversion to the same type would stand in a program, between what compilers match as neighbours."""
    return x if x.dtype == dtype else x.to(dtype)


def _dynamic(x: Tensor, spec: QuantSpec) -> Tensor:
    """As `dynamic_fake_quantize`; the range of zeros alone has the least scale there is, which gives zeros."""
    grid = _grid(spec)
    kind, block = "SYMMETRIC" if spec.symmetric else "ASYMMETRIC", _block(spec, x)
    ops: Any = torch.ops.torchao
    wide, codes = _in_dtype(x, torch.float32), storage_dtype(spec.dtype)
    types = {"eps": TINY, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    scale, zero = ops.choose_qparams_affine(wide, kind, block, codes, *grid, **types)
    quantized = ops.quantize_affine(wide, block, scale, zero, codes, *grid)
    return _in_dtype(ops.dequantize_affine(quantized, block, scale, zero, codes, *grid), x.dtype)


def _through_floats(x: Tensor, scale: Tensor | None, spec: QuantSpec) -> Tensor:
    """`x` as floats of 8 bits, times `scale`, or times scales of its own range where there is none."""
    ops: Any = torch.ops.torchao
    kind = TORCH_FLOATS[spec.dtype.name]
    if scale is None:
        wide, least = _in_dtype(x, torch.float32), TINY * spec.dtype.largest
        scale = ops.choose_scale_float8(wide, _block(spec, x), kind, hp_value_lb=least)
    codes = ops.quantize_affine_float8_non_decomposed(x, scale, kind)
    return ops.dequantize_affine_float8_non_decomposed(codes, scale, x.dtype)


def _block(spec: QuantSpec, x: Tensor) -> list[int]:
    """The elements of `x` that share a scale, by axis."""
    whole = list(x.shape)
    if spec.granularity == "tensor":
        return whole
    if spec.granularity == "channel":
        axis = (spec.axis or 0) % x.dim()
        return [1 if i == axis else size for i, size in enumerate(whole)]
    if spec.granularity == "block":
        return [*[1] * (x.dim() - 2), *(spec.block_size or ())]
    return [*[1] * (x.dim() - 1), whole[-1] if spec.granularity == "token" else spec.group_size or 1]
