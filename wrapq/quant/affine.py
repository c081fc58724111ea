"""Quantization of tensors to a grid: `x ~ (q - zero_point) * scale`, scale in float units per step.

What `quantize` gives are codes (`wrapq.quant.dtypes`): an integer dtype's are the integers q themselves; for the others
`q` is the number that the code stands for, and there is no zero point.

Letters: B batch, T tokens, K in, N out, G groups, g group size. `scale` is float32 and `zero_point` int32, or float32
where the spec's zero points are floats, both shaped

| granularity | shape                                                       |
|-------------|-------------------------------------------------------------|
| tensor      | (1,)                                                        |
| channel     | the tensor's rank, C on the axis and 1 elsewhere: [N, 1]    |
| group       | [..., K / g] for a tensor [..., K]                          |
| block       | [..., ceil(N / r), ceil(K / c)] for a tensor [..., N, K]    |
| token       | [..., 1] for a tensor [..., K]                              |
| head        | [H, 1, 1] for a tensor [..., H, T, D]                       |

and anything that broadcasts to these, such as a group scale [K / g] shared by all rows. `zero_point` is None where the
grid is signed and symmetric, since it is zero there. Its dtype decides what is rounded: `q = round(x / scale) +
zero_point` for an integer, `q = round(x / scale + zero_point)` for a float, which leaves zero off the grid. The
arithmetic is float32 whatever the input's dtype, in which every grid up to 16 bits and every difference of its points
is exact.

Where a spec's zero point is `min`, `zero_point` is what code 0 stands for with its sign turned, float32, a number and
not of steps: `x ~ q * scale - minimum`, in this order.

Where a spec has a global scale G, float32 (1,), the scale in use is `scale / G`: compressed-tensors' direction, in
which G is large and `scale` fills the range of fp8_e4m3 (NVIDIA's own documents multiply by 1 / G).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from wrapq.errors import SpecError
from wrapq.quant import casts
from wrapq.quant.dtypes import SUPER_BLOCK, DType
from wrapq.quant.rounded_scales import (
    E4M3_LEAST,
    E4M3_MAX,
    TINY,
    power_of_two_scale,
    round_minimum,
    round_scale,
    round_zero_point,
    usable_scale,
    zero_in_steps,
)
from wrapq.quant.spec import QuantSpec

LARGEST = torch.finfo(torch.bfloat16).max
"""The largest magnitude that a dequantized number may have: finite in float32 and in bfloat16."""
FARTHEST = 2.0**14
"""How many steps a range with a float zero point may lie from zero: float32 resolves one to 1/512 there."""
_PIECE, _GPU_PIECE = 1 << 22, 1 << 26  # elements that are worked on at once


def storage_dtype(dtype: DType) -> torch.dtype:
    """The smallest torch integer that holds the codes and that torch computes with: uint9 to uint16 need int32."""
    if dtype.kind != "int":
        return torch.uint8
    if dtype.bits <= 8:
        return torch.int8 if dtype.signed else torch.uint8
    return torch.int16 if dtype.signed else torch.int32


def zero_point_dtype(spec: QuantSpec) -> torch.dtype:
    """What a zero point is stored in: an integer as a code, a float as the scale, as which integers are packed."""
    if spec.zero_point == "int":
        return storage_dtype(spec.dtype)
    return torch.int32 if spec.super_blocks else getattr(torch, spec.scale_dtype)


def scale_shape(shape: Sequence[int], spec: QuantSpec) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`, found without data; raises `SpecError` where the group size does
    not divide the width, or the tensor has no such axis."""
    if spec.granularity == "tensor":
        return (1,)
    if spec.granularity == "channel":
        axis = _axis(len(shape), spec)
        return tuple(size if i == axis else 1 for i, size in enumerate(shape))
    if spec.granularity == "block":
        sides = zip(shape[-2:], _tile(len(shape), spec), strict=True)
        return (*shape[:-2], *(-(-size // side) for size, side in sides))
    if spec.granularity == "head":
        return (shape[_axis(len(shape), spec)], 1, 1)
    return (*shape[:-1], 1 if spec.granularity == "token" else _groups(shape, spec))


def split_groups(x: Tensor, spec: QuantSpec) -> Tensor:
    """The view [..., G, g] of `x` [..., K]; raises `SpecError` when g does not divide K."""
    return x.unflatten(-1, (_groups(x.shape, spec), spec.group_size or 1))


def reduce_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The smallest and largest element under each scale, float32, shaped like the scale. NaN propagates. Raises as
    `scale_shape`."""
    if spec.granularity == "token":
        return range_over(x, [-1])
    if spec.granularity == "tensor":
        low, high = torch.aminmax(x)
        return low.float().reshape(1), high.float().reshape(1)
    if spec.granularity == "group":
        low, high = range_over(split_groups(x, spec), [-1])
    elif spec.granularity == "block":
        low, high = range_over(split_tiles(x, spec), [-3, -1])
    else:
        axis = _axis(x.dim(), spec)
        low, high = range_over(x, [i for i in range(x.dim()) if i != axis])
    shape = scale_shape(x.shape, spec)
    return low.reshape(shape), high.reshape(shape)


def split_tiles(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` [..., N, K] as [..., N / r, r, K / c, c], a view where blocks fit; others repeat their last elements."""
    rows, columns = _tile(x.dim(), spec)
    missing = -x.shape[-2] % rows, -x.shape[-1] % columns
    for dim, count in zip((-2, -1), missing, strict=True):
        if count:
            last = x.narrow(dim, x.shape[dim] - 1, 1)
            sizes = [count if i == x.dim() + dim else -1 for i in range(x.dim())]
            x = torch.cat([x, last.expand(sizes)], dim)
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def range_over(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The smallest and largest element over `dims`, kept as size 1; float32. No dims: the elements themselves."""
    if not dims:
        return x.float(), x.float()
    return x.amin(tuple(dims), keepdim=True).float(), x.amax(tuple(dims), keepdim=True).float()


def global_scale_for(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor | None:
    """The global scale, float32 (1,), of a tensor whose scales' ranges are `low` to `high`; None for a spec without.

    It is compressed-tensors' `448 * 6 / absmax` for nvfp4: the widest range's scale becomes 448, the largest of
    fp8_e4m3. A tensor of zeros has 1.
    """
    if not spec.global_scale:
        return None
    bound = torch.maximum(low.float().abs().amax(), high.float().abs().amax())
    largest = E4M3_MAX * spec.dtype.half_range
    scale = (largest / bound).clamp(largest / LARGEST, E4M3_LEAST / TINY)
    return torch.where(bound == 0, 1.0, scale).reshape(1)


def range_to_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32) and zero point (int32, float32, or None for zero everywhere) for ranges `low` to `high`.

    A symmetric range is widened to [-a, a] and divided into `qmax - qmin` steps, as compressed-tensors does (7.5 steps
    to a side for int4): no element in it is off by more than half a step; on a float's or codebook's grid `a` is the
    largest number. With signed scales the scale is negative where `high` is the longer side, which has the lowest level
    of the grid then. An asymmetric one is widened to hold zero, which is then on the grid; with a float zero point it
    is divided as it is, unless it lies more than `FARTHEST` of its steps from zero, which makes the steps larger. A
    range of zero width has scale 1; no scale is smaller than the least normal float32, nor so large that a dequantized
    number overflows.

    A scale is then rounded to the spec's `scale_dtype`, to nearest; one too small for it is its least positive
    number. An e8m0 scale is `2 ** (floor(log2(a)) - emax)`, emax being the exponent of the grid's largest number (OCP
    MX specification 1.0, section 6.3), and twice that where `a >= 1.75 * 2 ** floor(log2(a))` and is not below the
    grid's largest number: compressed-tensors' rule, which loses less than the specification's, under which such an `a`
    saturates. The MX specification counts an mxint8 element in steps of 1/64: its shared exponent is ours plus 6.
    """
    dtype, low, high = spec.dtype, low.float(), high.float()
    if spec.symmetric:
        bound = torch.maximum(low.abs(), high.abs())
        if spec.scale_dtype == "e8m0":
            return power_of_two_scale(bound, dtype), _zero_point_for(bound, dtype)
        levels = dtype.largest_code - dtype.least_code if dtype.kind == "int" else 2 * dtype.largest
        scale = usable_scale(bound / dtype.half_range, bound, LARGEST * 2 / (levels + 1), spec)
        scale = scale if global_scale is None else torch.where(bound == 0, 1.0, bound / dtype.half_range * global_scale)
        signs = torch.where(high > -low, -1.0, 1.0) if spec.signed_scale else 1.0
        scale = round_scale(scale * signs, spec) if spec.super_blocks else round_scale(scale, spec) * signs
        return scale, _zero_point_for(scale, dtype)
    steps = dtype.qmax - dtype.qmin
    if spec.zero_point == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
    elif spec.zero_point == "min":
        minimum = round_minimum(-low, spec)
        low, high = -minimum, torch.maximum(-minimum, high)
    half_width = high * 0.5 - low * 0.5  # halves, because the width of a finite range may be infinite
    if spec.zero_point != "int":
        half_width = torch.maximum(half_width, torch.maximum(low.abs(), high.abs()) * (steps / 2 / FARTHEST))
    scale = round_scale(usable_scale(half_width / (steps / 2), half_width, LARGEST / steps, spec), spec)
    if spec.zero_point == "min":
        return scale, minimum
    return scale, round_zero_point((low / scale).neg_().add_(dtype.qmin), spec)


def _zero_point_for(scale: Tensor, dtype: DType) -> Tensor | None:
    return None if dtype.signed else torch.full_like(scale, 1 << (dtype.bits - 1), dtype=torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, global_scale: Tensor | None = None
) -> Tensor:
    """The codes of the nearest grid points in `storage_dtype`, shaped like `x`.

    Ties go to even, for integers before an integer zero point is added, for floats as `wrapq.quant.casts` says. NaN
    has a code in fp8 only; elsewhere the code it gets is any.
    """
    zero_point = zero_in_steps(scale, zero_point, spec)
    return _restore(quantize_elements(*_align(x, scale, zero_point, spec, global_scale), spec.dtype), x, spec)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Tensor:
    """What the codes `q` stand for, `(q - zero_point) * scale`, in `dtype`, shaped like `q`."""
    minimum, aligned = spec.zero_point == "min", _align(q, scale, zero_point, spec, global_scale)
    return _restore(dequantize_elements(*aligned, spec.dtype, dtype, minimum), q, spec)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, global_scale: Tensor | None = None
) -> Tensor:
    """`dequantize(quantize(x))` to the bit, in the dtype of `x` and without the codes; NaN stays NaN."""
    if spec.zero_point == "min":
        return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec, x.dtype)
    return _restore(fake_quantize_elements(*_align(x, scale, zero_point, spec, global_scale), spec.dtype), x, spec)


def dynamic_fake_quantize(x: Tensor, spec: QuantSpec, global_scale: Tensor | None = None) -> Tensor:
    """`x` fake-quantized with the scales of its own range, and with its own global scale where the spec has one and
    none is given. An empty tensor is returned as it is."""
    if not x.numel():
        return x
    low, high = reduce_range(x, spec)
    if global_scale is None:
        global_scale = global_scale_for(low, high, spec)
    return fake_quantize(x, *range_to_qparams(low, high, spec, global_scale), spec, global_scale)


def effective_scale(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The scale to divide by: `scale`, relative to the global scale where there is one."""
    return scale if global_scale is None else scale / global_scale


def quantize_elements(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DType) -> Tensor:
    """As `quantize`, for parameters that broadcast to `x` as they are."""
    if x.numel() > _piece(x) and len(x) > 1:
        codes = torch.empty(x.shape, dtype=storage_dtype(dtype), device=x.device)
        for part, scales, zeros in _pieces(x, scale, zero_point):
            codes[part] = quantize_elements(x[part], scales, zeros, dtype)
        return codes
    steps = _divide(x, scale)
    if dtype.kind != "int":
        return casts.encode_nearest(steps, dtype)
    return _round_to_codes(steps, zero_point, dtype.qmin, dtype.qmax).to(storage_dtype(dtype))


def dequantize_elements(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DType, result: torch.dtype, minimum: bool = False
) -> Tensor:
    """As `dequantize`, for codes of `dtype` and parameters that broadcast to them as they are; `minimum` says that
    `zero_point` is one."""
    if q.numel() > _piece(q) and len(q) > 1:
        whole = torch.empty(q.shape, dtype=result, device=q.device)
        for part, scales, zeros in _pieces(q, scale, zero_point):
            whole[part] = dequantize_elements(q[part], scales, zeros, dtype, result, minimum)
        return whole
    steps = q.to(torch.float32, copy=True) if dtype.kind == "int" else casts.decode(q, dtype)
    if minimum and zero_point is not None:
        return _cast(steps.mul_(scale).sub_(zero_point), result)
    if zero_point is not None:
        steps.sub_(zero_point)
    return _cast(steps.mul_(scale), result)


def fake_quantize_elements(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DType) -> Tensor:
    """As `fake_quantize`, for parameters that broadcast to `x` as they are."""
    if x.numel() <= _piece(x):
        return _cast(round_to_grid(_divide(x, scale), zero_point, dtype).mul_(scale), x.dtype)
    if scale.numel() == 1 and x.dim() > 2 and x.is_contiguous():  # many rows, such as the logits of a position each
        scale, zero_point = scale.view(-1), zero_point if zero_point is None else zero_point.view(-1)
        return fake_quantize_elements(x.flatten(0, -2), scale, zero_point, dtype).view(x.shape)
    whole = torch.empty_like(x)
    for part, scales, zeros in _pieces(x, scale, zero_point):
        whole[part] = _cast(round_to_grid(_divide(x[part], scales), zeros, dtype).mul_(scales), x.dtype)
    return whole


def round_to_grid(steps: Tensor, zero_point: Tensor | None, dtype: DType) -> Tensor:
    """The grid points nearest to `steps`, multiples of the scale, which are overwritten: `round_to_grid(w / scale,
    zero_point, dtype) * scale` rounds `w`."""
    if dtype.kind != "int":
        return casts.round_to_format(steps, dtype)
    points = round_to_levels(steps, zero_point, dtype.qmin, dtype.qmax)
    return points.add_(0.0) if zero_point is None else points  # integers have no negative zero


def round_to_levels(steps: Tensor, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    """As `round_to_grid`, for integers from `low` to `high`; what is rounded to zero from below is a negative zero
    without a zero point."""
    codes = _round_to_codes(steps, zero_point, low, high)
    return codes if zero_point is None else codes.sub_(zero_point)


def _round_to_codes(steps: Tensor, zero_point: Tensor | None, low: Tensor | int, high: Tensor | int) -> Tensor:
    if zero_point is None:
        steps.round_()
    elif zero_point.is_floating_point():
        steps.add_(zero_point).round_()
    else:
        steps.round_().add_(zero_point)
    return steps.clamp_(low, high)  # type: ignore[arg-type]


def row_parts(x: Tensor) -> Iterator[slice]:
    """The first axis of `x` in parts that are worked on at once, in one where `x` is small or has no other axis: whole,
    what is made on the way would take several times the memory of `x`."""
    rows = max(1, _piece(x) * len(x) // x.numel()) if x.dim() > 1 and x.numel() > _piece(x) else max(1, len(x))
    yield from (slice(start, start + rows) for start in range(0, len(x), rows))


def _piece(x: Tensor) -> int:
    return _PIECE if x.device.type == "cpu" else _GPU_PIECE


def _pieces(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """`row_parts` of `x`, with the parameters of each."""
    for part in row_parts(x):
        own = (t if t is None or t.dim() < x.dim() or len(t) == 1 else t[part] for t in (scale, zero_point))
        yield part, cast(Tensor, next(own)), next(own)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return torch.div(x, scale)
    return x.float().div_(scale)  # in two steps: a division of mixed dtypes is ten times slower on a CPU


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:  # a grid point beyond a range that ends at 65504 would become inf
        x.clamp_(-65504.0, 65504.0)
    return x.to(dtype)


def _align(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, global_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x`, the scale in use and the zero point, viewed so that they broadcast."""
    scale = effective_scale(scale, global_scale)
    if spec.granularity == "group":
        return split_groups(x, spec), scale[..., None], None if zero_point is None else zero_point[..., None]
    if spec.granularity == "block":
        place = (..., None, slice(None), None)
        return split_tiles(x, spec), scale[place], None if zero_point is None else zero_point[place]
    return x, scale, zero_point


def _restore(result: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """The inverse of what `_align` did to the shape of `x`."""
    if spec.granularity != "block":
        return result.reshape(x.shape)
    whole = result.flatten(-4, -3).flatten(-2)
    return whole if whole.shape == x.shape else whole[..., : x.shape[-2], : x.shape[-1]].contiguous()


def _tile(rank: int, spec: QuantSpec) -> tuple[int, int]:
    if rank < 2:
        raise SpecError(f"{spec}: blocks of a tensor with {rank} dimensions")
    return spec.block_size or (1, 1)


def _axis(rank: int, spec: QuantSpec) -> int:
    """The axis of a tensor of `rank` dimensions along which scales differ, those of channels or of heads."""
    if spec.granularity == "head" and rank < 3:
        raise SpecError(f"{spec}: heads of a tensor with {rank} dimensions; head is for an attention's tensors")
    axis = -3 if spec.granularity == "head" else spec.axis or 0
    if not -rank <= axis < rank:
        raise SpecError(f"{spec}: axis {axis} of a tensor with {rank} dimensions")
    return axis % rank


def _groups(shape: Sequence[int], spec: QuantSpec) -> int:
    width, size = shape[-1] if len(shape) else 1, spec.group_size or 1
    if spec.super_blocks and width % SUPER_BLOCK:
        what = f"super-blocks of {SUPER_BLOCK} do not divide the width {width}"
        raise SpecError(f"{spec}: {what}; with scale=float16 each group stands by itself")
    if width % size:
        raise SpecError(f"{spec}: group size {size} does not divide the width {width} ({width % size} left over)")
    return width // size
