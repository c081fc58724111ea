"""The parameters with which one tensor is quantized, as one value."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wrapq.errors import ModelError, SpecError
from wrapq.quant import affine
from wrapq.quant.dtypes import dtype_named
from wrapq.quant.packing import pack, unpack
from wrapq.quant.rounded_scales import zero_in_steps
from wrapq.quant.spec import QuantSpec
from wrapq.quant.super_blocks import put_together, taken_apart

_PARTS = ("scale", "zero_point", "permutation", "global_scale")
_SUPER = {"scale": "super_scale", "zero_point": "zero_point_super_scale"}
STORED_PARTS: tuple[str, ...] = (*_PARTS, *_SUPER.values())
"""What the tensors of a checkpoint are called after the name of the point."""
_E8M0_BIAS = 127
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED |= dict.fromkeys(("int8", "uint6"), torch.int32)
_STORED |= {"fp8_e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}


@dataclass(frozen=True, eq=False)
class QParams:
    """Scales and zero points of one tensor, and what is needed to use them. Two are alike when their digests are.

    Attributes:
        spec: dtype, granularity, axis or group size, symmetry.
        scale: float32, float units per step, a number of the spec's `scale_dtype`; its shape is said in
            `wrapq.quant.affine`. Empty for a `local` spec, whose scales follow each tensor.
        zero_point: int32, or float32 where the spec has float ones or minima, numbers of its `scale_dtype`; shaped like
            `scale`; None for zero everywhere.
        permutation: int64 [K], for groups that follow an activation order: column j of the matrix belongs to slot
            `permutation[j]`, hence to group `permutation[j] // group_size`. None for groups of neighbours.
        global_scale: float32 (1,), for a spec that has one: the scale in use is `scale / global_scale`.

    Raises:
        SpecError: a permutation without groups, or a global scale that the spec does not have, or lacks.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor | None = None
    permutation: Tensor | None = None
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.permutation is not None and self.spec.granularity != "group":
            raise SpecError(f"{self.spec}: an activation order is for granularity group, not {self.spec.granularity}")
        if self.spec.global_scale != (self.global_scale is not None):
            raise SpecError(f"{self.spec}: {'no' if self.spec.global_scale else 'has no'} global scale")

    @property
    def effective_scale(self) -> Tensor:
        """The scale in use, float32: relative to the global scale where there is one."""
        return affine.effective_scale(self.scale, self.global_scale)

    @property
    def zero_in_steps(self) -> Tensor | None:
        """The zero point in steps of the scale, int32 or float32, shaped like it; None for zero everywhere."""
        return zero_in_steps(self.effective_scale, self.zero_point, self.spec)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of `x`, in `affine.storage_dtype`."""
        if self.permutation is None:
            return affine.quantize(x, self.scale, self.zero_point, self.spec, self.global_scale)
        scale, zero_point = self._per_column(x)
        zero_point = zero_in_steps(scale, zero_point, self.spec)
        return affine.quantize_elements(x, scale, zero_point, self.spec.dtype)

    def dequantize(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that the codes `q` stand for."""
        if self.permutation is None:
            return affine.dequantize(q, self.scale, self.zero_point, self.spec, dtype, self.global_scale)
        minimum = self.spec.zero_point == "min"
        return affine.dequantize_elements(q, *self._per_column(q), self.spec.dtype, dtype, minimum)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`dequantize(quantize(x), x.dtype)` to the bit; of a `local` spec with the group scales of `x` itself."""
        if self.spec.local:
            return affine.dynamic_fake_quantize(x, self.spec, self.global_scale)
        if self.permutation is None:
            return affine.fake_quantize(x, self.scale, self.zero_point, self.spec, self.global_scale)
        if self.spec.zero_point == "min":
            return self.dequantize(self.quantize(x), x.dtype)
        return affine.fake_quantize_elements(x, *self._per_column(x), self.spec.dtype)

    def of_rows(self, rows: Tensor) -> QParams:
        """Those of some `rows`, int64 [M], of the matrix [N, K] that these are of."""
        spec, parts = self.spec, self._parts()
        if spec.granularity == "block" and spec.block_size is not None:  # each row in blocks of its own
            rows, spec = rows // spec.block_size[0], replace(spec, block_size=(1, spec.block_size[1]))
        for name in {"scale", "zero_point"} & parts.keys():
            if parts[name].dim() > 1 and len(parts[name]) > 1:  # else all rows share it
                parts[name] = parts[name].index_select(0, rows)
        return QParams(spec, **parts)

    def to(self, device: torch.device | str) -> QParams:
        """The same parameters on `device`."""
        return QParams(self.spec, **{name: tensor.to(device) for name, tensor in self._parts().items()})

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What a checkpoint stores, where present: `<prefix>_scale`, `_zero_point`, `_permutation`, `_global_scale`.

        The scale is in the spec's `scale_dtype`: e8m0 as the exponent plus 127 in uint8, fp8_e4m3 as torch's own. The
        zero point is in `affine.zero_point_dtype`. Of super-blocks [..., S] the integers are packed, int32, and
        `<prefix>_super_scale` and, for minima, `<prefix>_zero_point_super_scale` are what they are multiplied with,
        float16.
        """
        parts = self._parts()
        for name in self._of_super_blocks(self.spec):
            codes, parts[_SUPER[name]] = taken_apart(parts[name], self.spec)
            parts[name] = pack(codes, dtype_named(self.spec.scale_dtype))
        if self.zero_point is not None:
            parts["zero_point"] = parts["zero_point"].to(affine.zero_point_dtype(self.spec))
        if self.spec.local:
            del parts["scale"]
        elif self.spec.scale_dtype == "e8m0":
            parts["scale"] = (torch.frexp(self.scale).exponent + (_E8M0_BIAS - 1)).to(torch.uint8)
        else:
            parts["scale"] = parts["scale"].to(_STORED[self.spec.scale_dtype])
        return {f"{prefix}_{name}": tensor for name, tensor in parts.items()}

    @classmethod
    def from_tensors(cls, prefix: str, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QParams:
        """The inverse of `tensors`; raises `ModelError` when a part is missing or has another dtype."""
        found = {name: tensors[f"{prefix}_{name}"] for name in STORED_PARTS if f"{prefix}_{name}" in tensors}
        needed = {"scale": not spec.local, "zero_point": not spec.symmetric, "global_scale": spec.global_scale}
        needed |= {_SUPER[name]: True for name in cls._of_super_blocks(spec)}
        for name, needs in needed.items():
            if needs and name not in found:
                raise ModelError(f"no {prefix}_{name} for {spec}")
        expected = {"scale": _STORED[spec.scale_dtype], "zero_point": affine.zero_point_dtype(spec)}
        expected |= {"permutation": torch.int64, "global_scale": torch.float32}
        expected |= dict.fromkeys(_SUPER.values(), torch.float16)
        for name, tensor in found.items():
            if tensor.dtype != expected[name]:
                raise ModelError(f"{prefix}_{name} is {tensor.dtype}, not {expected[name]}")
        for name in cls._of_super_blocks(spec):
            step = found.pop(_SUPER[name])
            count = step.shape[-1] * spec.groups_at_once
            found[name] = put_together(unpack(found[name], dtype_named(spec.scale_dtype), count), step, spec)
        if "zero_point" in found:
            found["zero_point"] = found["zero_point"].to(torch.int32 if spec.zero_point == "int" else torch.float32)
        if spec.local:
            found["scale"] = torch.empty(0, device=found["global_scale"].device)
        elif spec.scale_dtype == "e8m0":
            exponent = found["scale"].to(torch.int32) - _E8M0_BIAS
            found["scale"] = torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent)
        else:
            found["scale"] = found["scale"].float()
        return cls(spec, **found)

    def digest(self) -> str:
        """SHA-256, in hex, over the spec's short form and the name, shape and bytes of each tensor."""
        digest = hashlib.sha256(str(self.spec).encode())
        for name, tensor in self._parts().items():
            digest.update(f"\n{name}{tuple(tensor.shape)}:".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _of_super_blocks(spec: QuantSpec) -> list[str]:
        """The parts that are integers times what a super-block shares."""
        return (["scale"] + ["zero_point"] * (spec.zero_point == "min")) if spec.super_blocks else []

    def _parts(self) -> dict[str, Tensor]:
        return {name: tensor for name in _PARTS if (tensor := getattr(self, name)) is not None}

    def _per_column(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale in use and zero point of each column, [N, K]."""
        if self.permutation is None or x.shape[-1] != self.permutation.numel():
            raise SpecError(f"{self.spec}: an activation order for another width than {x.shape[-1]}")
        group = self.permutation // (self.spec.group_size or 1)
        zero_point = None if self.zero_point is None else self.zero_point[..., group]
        return self.effective_scale[..., group], zero_point
