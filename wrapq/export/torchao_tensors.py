"""A checkpoint whose weights are tensors of torchao, which transformers loads and torchao multiplies by.

Weights of 8 bits with one symmetric scale per output are `Int8Tensor`, which multiplies integers where inputs are
rounded token by token; others are `IntxUnpackedToInt8Tensor`, codes of 2 to 8 bits with a byte each. The layouts are
those of torchao 0.18 (`quantization/quantize_/workflows`), the file that of its `prototype/safetensors`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem
from wrapq.export.additions import refuse_corrections, refuse_float_prefix, refuse_online
from wrapq.export.base import EXPORTERS, Exporter, Folder, Reading, Refusals
from wrapq.export.folder_checkpoint import all_tensors, read_checkpoint, refuse_initialized, write_checkpoint
from wrapq.export.lowering import NEEDED
from wrapq.export.nearest import ELSE, remedy_for
from wrapq.export.reload import PLAIN
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.plan import ModulePlan, Plan
from wrapq.runtime.module import QuantizedWeight

_LINEAR = "Linear"
_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
_STEP = 5e-2
"""Where inputs are rounded, too: a number between two steps may fall to either side."""


@EXPORTERS.register("torchao")
class TorchaoTensors(Exporter):
    """Exporter of checkpoints of torchao's tensors."""

    extra: ClassVar[tuple[str, tuple[str, ...]]] = "torchao", (NEEDED,)

    def check(self, plan: Plan) -> Iterable[Problem]:
        yield from _refusals(plan).problems
        yield from self.missing_packages()

    def export(self, model: nn.Module, plan: Plan, folder: Folder) -> None:
        if problems := list(self.check(plan)):
            raise PlanError(problems)
        modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
        made = {f"{name}.weight": _tensor(module) for name, module in modules.items()}
        state = {**all_tensors(model, {}), **made}
        section = _section(modules) if modules else {}
        write_checkpoint(folder, model, plan.model.dtype, *_flat(state), section)

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        answer = read_checkpoint(folder, ids, device)
        return Reading(answer.logits[PLAIN], answer.measured, answer.tokens)

    def layers(self, plan: Plan) -> Iterable[str]:
        found = Counter(" with inputs in ".join(point.spec for point in _ordered(module)) for module in plan.modules)
        yield from (f"{count} layers in {words}" for words, count in found.items())

    def notes(self, plan: Plan) -> Iterable[str]:
        if any(p.quant_spec.dtype.bits < 8 for module in plan.modules for p in module.points if p.role == "weight"):
            yield "codes of fewer than 8 bits take a byte each"

    def tolerance(self, plan: Plan) -> float:
        rounded = any(point.role == "activation" for module in plan.modules for point in module.points)
        return _STEP if rounded else _TOLERANCE[plan.model.dtype]


def _ordered(module: ModulePlan) -> list[Any]:
    return sorted(module.points, key=lambda point: point.role != "weight")


def _refusals(plan: Plan) -> Refusals:
    refusals = Refusals()
    for module in plan.modules:
        specs = {point.name: point.quant_spec for point in module.points}
        if module.wrapper != _LINEAR:
            refusals.refuse(module, f"transformers puts torchao's tensors in linear layers, not in {module.type}", ELSE)
        elif EXPERT_NAME.fullmatch(module.name):
            refusals.refuse(module, "transformers puts experts together from other tensors", ELSE)
        elif others := set(specs) - {"weight", "input"}:
            refusals.refuse(module, f"torchao's tensors say nothing of the {min(others)}", "leave it float")
        elif "weight" not in specs:
            refusals.refuse(module, "a tensor of torchao is a weight, and this one is float", "leave its input float")
        else:
            _check(module, specs, refusals)
    refuse_corrections(plan, refusals, "torchao")
    refuse_online(plan, refusals)
    refuse_float_prefix(plan, refusals, "torchao")
    refuse_initialized(plan, refusals, {module.name: None for module in plan.modules})
    return refusals


def _check(module: ModulePlan, specs: Mapping[str, QuantSpec], refusals: Refusals) -> None:
    weight, inputs = specs["weight"], specs.get("input")
    if reason := _weight_reason(weight):
        remedy = remedy_for(weight, True, lambda near: _weight_reason(near) is None)
        refusals.refuse(module, f"weight in {weight}: {reason}", remedy)
    elif inputs is not None and (reason := _input_reason(inputs, _is_int8(weight))):
        kinds = "int8:token:sym:dyn or int8:token:asym:dyn" if _is_int8(weight) else "int8:token:asym:dyn"
        refusals.refuse(module, f"input in {inputs}: {reason}", f"quantize it in {kinds}, {ELSE}")


def _weight_reason(spec: QuantSpec) -> str | None:
    if spec.dtype.kind != "int" or not 2 <= spec.dtype.bits <= 8:
        return "its tensors have integers of 2 to 8 bits"
    if spec.zero_point != "int" or spec.global_scale or spec.dynamic:
        return "its scales are fixed, with no second one above them, and zero points are integers"
    if spec.granularity == "group" or (spec.granularity == "channel" and (spec.axis or 0) % 2 == 0):
        return None
    return "its tensors have scales by output channel and by group"


def _input_reason(spec: QuantSpec, integers: bool) -> str | None:
    """What torchao does not do to an input; `integers` says that the weight is an `Int8Tensor`."""
    if not spec.dynamic or spec.granularity != "token" or spec.dtype.name != "int8":
        return "transformers loads those alone that round inputs to 8 bits token by token, as they come"
    return None if integers or not spec.symmetric else "beside such weights it rounds inputs with a zero point"


def _is_int8(spec: QuantSpec) -> bool:
    """Whether the weight is an `Int8Tensor`."""
    return spec.dtype.bits == 8 and spec.dtype.signed and spec.symmetric and spec.granularity == "channel"


def _tensor(module: QuantizedWeight) -> Tensor:
    """The weight of a linear layer as a tensor of torchao."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    spec, inputs, qparams = module.specs["weight"], module.specs.get("input"), module.qparams("weight")
    if qparams.permutation is not None:
        raise ModelError("torchao has no tensor for groups that follow an activation order")
    down = 0 if spec.dtype.signed else 2 ** (spec.dtype.bits - 1)
    codes = (module.codes().to(torch.int16) - down).to(torch.int8).contiguous()
    rows, columns = codes.shape
    size = spec.group_size or columns
    scale = qparams.scale.detach().reshape(rows, -1).contiguous()
    if _is_int8(spec):
        kinds = {True: MappingType.SYMMETRIC, False: MappingType.ASYMMETRIC}
        rounded = None if inputs is None else QuantizeTensorToInt8Kwargs(PerRow(), kinds[inputs.symmetric])
        return cast(Tensor, Int8Tensor(codes, scale, [1, columns], module.weight_dtype, act_quant_kwargs=rounded))
    zero = torch.zeros_like(scale) if qparams.zero_point is None else qparams.zero_point.reshape(rows, -1)
    target = getattr(torch, f"int{spec.dtype.bits}")
    rounds = None if inputs is None else "int8_asym_per_token"
    zeros = (zero.to(torch.int16) - down).to(torch.int8)
    return cast(Tensor, IntxUnpackedToInt8Tensor(codes, scale, zeros, target, (1, size), module.weight_dtype, rounds))


def _flat(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain tensors that `state` is stored as, and what else the file says of them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, facts = flatten_tensor_state_dict(dict(state))
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(facts)


def _section(modules: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """How `config.json` says that each layer is quantized, in torchao's words."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    return dict(TorchAoConfig(FqnToConfig({name: _config(module) for name, module in modules.items()})).to_dict())


def _config(module: QuantizedWeight) -> Any:
    from torchao import quantization

    spec, inputs = module.specs["weight"], module.specs.get("input")
    kinds = {True: quantization.MappingType.SYMMETRIC, False: quantization.MappingType.ASYMMETRIC}
    if _is_int8(spec):
        if inputs is None:
            return quantization.Int8WeightOnlyConfig()
        return quantization.Int8DynamicActivationInt8WeightConfig(act_mapping_type=kinds[inputs.symmetric])
    shared = quantization.PerGroup(spec.group_size) if spec.group_size else quantization.PerAxis(0)
    dtype, kind = getattr(torch, f"int{spec.dtype.bits}"), kinds[spec.symmetric]
    if inputs is None:
        return quantization.IntxWeightOnlyConfig(dtype, shared, kind)
    return quantization.Int8DynamicActivationIntxWeightConfig(dtype, shared, kind)
