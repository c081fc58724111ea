"""What the layouts of GPTQ and of AWQ have in common: weights alone, one scheme for all, integers packed in int32.

Both are read by transformers through GPTQModel, by vLLM and by SGLang. What transformers reads decides what is allowed:
it replaces linear layers in blocks, all by the same class, and leaves the output layer float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export.additions import refuse_corrections, refuse_float_prefix, refuse_online
from wrapq.export.base import Exporter, Folder, Reading, Refusals
from wrapq.export.folder_checkpoint import all_tensors, read_checkpoint, refuse_initialized, write_checkpoint
from wrapq.export.reload import PLAIN
from wrapq.export.scheme import linear_scheme
from wrapq.export.vllm import fusion_refusals
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.quant.dtypes import DType, dtype_named
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import ModulePlan, Plan
from wrapq.runtime.module import QuantizedWeight
from wrapq.wrappers.experts import can_be_taken_apart

PER_CHANNEL = -1
"""The group size that stands for one scale per output."""
TILE = 16
"""The outputs of a 4-bit weight must be a multiple of it, and groups have 32 inputs or more, although GPTQModel says
that it takes others: on a CPU it multiplies by torch's `_weight_int4pack_mm_for_cpu`, which does not."""
_WORD, _BLOCK = 32, 128
_LINEAR = "Linear"
_TOLERANCE = 3e-2
"""Scales are rounded to half precision, and GPTQModel multiplies by 4-bit weights in bfloat16 on a CPU."""
_SCALES = "float16"
_REMEDY = "leave it float, or run with export=none"
_SHARED = ("tensor", "channel", "group")


@dataclass(frozen=True)
class PackedWeight:
    """A weight as these layouts name its parts.

    Attributes:
        codes: int32 [K, N], from zero on.
        zeros: int32 [G, N], on the same grid.
        scales: float16 [G, N].
        groups: int32 [K], the group of each input.
        ordered: whether the groups follow an activation order and so are none of neighbours.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor
    ordered: bool


@dataclass
class LayoutRefusals(Refusals):
    """What of a plan a layout does not hold.

    Attributes:
        schemes: bits and group size of every layer that it does.
    """

    schemes: dict[str, tuple[int, int]] = field(default_factory=dict)


class Int32Layout(Exporter, ABC):
    """An exporter of one of these layouts.

    Attributes:
        layout: what messages call it.
        bits: how many a code may have.
        group_sizes: how many inputs may share a scale.
    """

    layout: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]

    @abstractmethod
    def fits(self, bits: int, rows: int, columns: int) -> bool:
        """Whether codes and zero points of a weight [rows, columns] fill words, and GPTQModel multiplies by it."""

    @abstractmethod
    def tensors(self, weight: PackedWeight, bits: int, symmetric: bool) -> dict[str, Tensor]:
        """What is stored of a layer, by the names within it; `symmetric` says that all layers are."""

    @abstractmethod
    def quantization_config(self, model: nn.Module, plan: Plan, weights: Mapping[str, PackedWeight]) -> dict[str, Any]:
        """The section of `config.json`; `weights` are all quantized layers of the converted `model`."""

    def check(self, plan: Plan) -> Iterable[Problem]:
        yield from self._refusals(plan).problems
        yield from self.missing_packages()

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        if problems := self._refusals(plan).problems:
            raise PlanError(problems)
        modules = model.named_modules()
        weights = {name: packed_weight(module) for name, module in modules if isinstance(module, QuantizedWeight)}
        if large := [name for name, weight in weights.items() if not weight.scales.isfinite().all()]:
            raise ModelError(f"{large[0]}: its scales are too large for {_SCALES}, which {self.layout} has")
        if not weights:  # the float model
            write_checkpoint(folder, model, plan.model.dtype, all_tensors(model, {}), {}, {})
            return
        bits, symmetric = _scheme(plan)[0], is_symmetric(plan)
        packed = {name: self.tensors(weight, bits, symmetric) for name, weight in weights.items()}
        section = self.quantization_config(model, plan, weights)
        write_checkpoint(folder, model, plan.model.dtype, all_tensors(model, packed), {}, section)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        answer = read_checkpoint(folder, ids, device)
        return Reading(answer.logits[PLAIN], answer.measured, answer.tokens)

    def layers(self, plan: Plan) -> Iterable[str]:
        for (bits, group_size), count in Counter(self._refusals(plan).schemes.values()).items():
            kind = "symmetric" if is_symmetric(plan) else "with zero points"
            yield f"{self.layout}: {count} layers, {_words(bits, group_size)}, {kind}"

    def notes(self, plan: Plan) -> Iterable[str]:
        specs = [spec for points in plan.specs().values() for spec in points.values()]
        if any(spec.scale_dtype != _SCALES for spec in specs):
            yield f"scales are rounded to {_SCALES}; scale={_SCALES} in a spec calibrates with such ones"
        schemes = {module.name: linear_scheme({p.name: p.quant_spec for p in module.points}) for module in plan.modules}
        floats = dict.fromkeys(row.name for row in plan.untouched if row.type == _LINEAR)
        yield from (f"{where}: {what}" for where, what in fusion_refusals({**floats, **schemes}, {}))

    def tolerance(self, plan: Plan) -> float:
        return _TOLERANCE

    def _refusals(self, plan: Plan) -> LayoutRefusals:
        refusals = LayoutRefusals()
        for module in plan.modules:
            self._check_layer(module, refusals)
        most = Counter(refusals.schemes.values()).most_common(1)
        for module in (m for m in plan.modules if m.name in refusals.schemes):
            if refusals.schemes[module.name] != most[0][0]:
                what = f"{self.layout} has one scheme for all layers, and most are {_words(*most[0][0])}"
                near = _spec(*most[0][0], module.points[0].quant_spec.symmetric)
                refusals.refuse(module, what, f"quantize it as {near}, {_REMEDY}")
        refuse_corrections(plan, refusals, self.layout)
        refuse_online(plan, refusals)
        refuse_float_prefix(plan, refusals, self.layout)
        self._check_experts(plan, refusals)
        refuse_initialized(plan, refusals, dict.fromkeys(refusals.schemes))
        return refusals

    def _check_layer(self, module: ModulePlan, refusals: LayoutRefusals) -> None:
        if module.wrapper != _LINEAR:
            what = f"{self.layout} has linear layers alone, not {module.type}"
            refusals.refuse(module, what, _REMEDY)
            return
        specs = {point.name: point.quant_spec for point in module.points}
        if module.block is None:
            what = f"transformers reads {self.layout} in blocks alone, and leaves the layers outside them float"
            refusals.refuse(module, what, _REMEDY)
        elif others := {name: spec for name, spec in specs.items() if name != "weight"}:
            what = f"{self.layout} has weights alone, and {next(iter(others))} is {next(iter(others.values()))}"
            near = self._nearest(module) if self._reason(module) else None
            also = f" and quantize its weight as {near}" if near else ""
            refusals.refuse(module, what, f"leave {', '.join(others)} float{also}, or run with export=none")
        elif reason := self._reason(module):
            near = self._nearest(module)
            remedy = f"quantize it as {near}, {_REMEDY}" if near else _REMEDY
            refusals.refuse(module, f"{specs['weight']}: {reason}", remedy)
        else:
            refusals.schemes[module.name] = specs["weight"].dtype.bits, group_size_of(specs["weight"])

    def _reason(self, module: ModulePlan) -> str | None:
        """Why the layout does not hold the weight of `module`, or None."""
        spec = next((point.quant_spec for point in module.points if point.role == "weight"), None)
        rows, columns = module.weight_shape or (0, 0)
        if spec is None:
            return f"{self.layout} has no layer whose weight is float"
        if spec.dtype.kind != "int" or spec.dtype.bits not in self.bits:
            return f"{self.layout} has integers of {_listed(self.bits)} bits"
        if spec.granularity not in _SHARED or spec.axis not in (None, 0, -2):
            return f"{self.layout} has scales by channel and by group of inputs"
        if spec.zero_point != "int":
            return f"zero points of {self.layout} are integers"
        if spec.global_scale:
            return f"{self.layout} has no scale above the others"
        if group_size_of(spec) not in self.group_sizes:
            return f"{self.layout} is read by channel and in groups of {_listed(self.group_sizes[1:])}"
        if not self.fits(spec.dtype.bits, rows, columns):
            return f"GPTQModel takes no {spec.dtype.bits}-bit weight of {rows} outputs and {columns} inputs"
        return None

    def _nearest(self, module: ModulePlan) -> str | None:
        """The spec that is most like that of the weight of `module` and that the layout holds; None for none."""
        rows, columns = module.weight_shape or (0, 0)
        spec = next((p.quant_spec for p in module.points if p.role == "weight"), QuantSpec(dtype_named("int4")))
        wanted = spec.group_size or (_BLOCK if spec.granularity == "block" else columns)
        width = {size: columns if size == PER_CHANNEL else size for size in self.group_sizes}
        for bits in sorted(self.bits, key=lambda bits: (bits < spec.dtype.bits, abs(bits - spec.dtype.bits))):
            for size in sorted(width, key=lambda size: (width[size] > wanted, abs(width[size] - wanted))):
                if self.fits(bits, rows, columns) and columns % width[size] == 0:
                    return _spec(bits, size, spec.symmetric)
        return None

    def _check_experts(self, plan: Plan, refusals: Refusals) -> None:
        experts = [module for module in plan.modules if EXPERT_NAME.fullmatch(module.name)]
        if experts and any(map(can_be_taken_apart, ModelSource(plan.recipe.model).meta_model().modules())):
            for module in experts:
                what = f"transformers does not put experts together from {self.layout}"
                refusals.refuse(module, what, "leave it float, or run with export=compressed_tensors")


def group_size_of(spec: QuantSpec) -> int:
    """How many inputs share a scale, as these layouts say it."""
    return spec.group_size or PER_CHANNEL


def is_symmetric(plan: Plan) -> bool:
    """Whether zero lies in the middle of every grid, where readers need no zero point."""
    specs = [spec for points in plan.specs().values() for spec in points.values()]
    return all(spec.symmetric and spec.dtype.signed for spec in specs)


def packed_weight(module: QuantizedWeight) -> PackedWeight:
    """The parts of the weight of a layer."""
    qparams, codes = module.qparams("weight"), module.codes()
    least, scale = qparams.spec.dtype.least_code, _by_row(qparams.scale, len(codes))
    zero = torch.zeros_like(scale) if qparams.zero_point is None else _by_row(qparams.zero_point, len(codes))
    return PackedWeight(
        (codes.to(torch.int32) - least).t().contiguous(),
        (zero.to(torch.int32) - least).t().contiguous(),
        scale.to(torch.float16).t().contiguous(),
        _groups(qparams, codes.shape[1]),
        qparams.permutation is not None,
    )


def _by_row(values: Tensor, rows: int) -> Tensor:
    """`values` [N, G]; those of a whole tensor for every row."""
    return values if values.dim() > 1 else values.reshape(1, 1).expand(rows, 1)


def _groups(qparams: QParams, columns: int) -> Tensor:
    places = torch.arange(columns) if qparams.permutation is None else qparams.permutation.cpu()
    return (places // (qparams.spec.group_size or columns)).to(torch.int32)


def unsigned(bits: int) -> DType:
    """The grid of the stored codes."""
    return dtype_named(f"uint{bits}")


def whole_words(count: int, bits: int) -> bool:
    """Whether `count` codes of so many bits fill words."""
    return count * bits % _WORD == 0


def float_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...], weights: Mapping[str, Any]) -> Iterator[str]:
    """The names of the layers of `kinds` that are none of the quantized `weights`, those with tied tensors too."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) and name not in weights:
            yield name


def _scheme(plan: Plan) -> tuple[int, int]:
    """Bits and group size of the quantized layers of a plan that was checked."""
    spec = plan.modules[0].points[0].quant_spec
    return spec.dtype.bits, group_size_of(spec)


def _spec(bits: int, group_size: int, symmetric: bool) -> str:
    shared = "channel" if group_size == PER_CHANNEL else f"g{group_size}"
    return f"int{bits}:{shared}:{'sym' if symmetric else 'asym'}"


def _words(bits: int, group_size: int) -> str:
    return f"{bits}-bit {'by channel' if group_size == PER_CHANNEL else f'by group of {group_size}'}"


def _listed(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
