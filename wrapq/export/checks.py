"""A plan in the words of compressed-tensors, with every refusal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from wrapq.errors import SpecError
from wrapq.export.additions import refuse_corrections, refuse_float_prefix, refuse_online
from wrapq.export.base import Refusals
from wrapq.export.checkpoint_names import checkpoint_names
from wrapq.export.folder_checkpoint import refuse_initialized
from wrapq.export.nearest import ELSE, remedy_for
from wrapq.export.scheme import MXFP4, MXFP8, NVFP4, PACK, Args, Scheme, cache_args, linear_scheme
from wrapq.export.transform_config import rotated_layers
from wrapq.export.vllm import cache_refusal, fusion_refusals, linear_refusal, rotation_refusal
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.quant.spec import QuantSpec
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import ModulePlan, Plan
from wrapq.wrappers.experts import can_be_taken_apart

VLLM = "vllm"
_REMEDY = "quantize it otherwise, leave it float, or run with export=none"
_READER_REMEDY = "quantize it otherwise, or give vLLM up with export.compressed_tensors.reader=transformers"
_ROTATION_REMEDY = "leave the rotation out, or give vLLM up with export.compressed_tensors.reader=transformers"
_LINEAR, _ATTENTION = "Linear", "Attention"
_CACHE_POINTS = {"key", "value"}


@dataclass
class Translation(Refusals):
    """A plan in the terms of compressed-tensors.

    Attributes:
        schemes: the scheme of every quantized linear layer, by name.
        cache: the `kv_cache_scheme`, None where the cache stays float.
        floats: the linear layers left float.
        outside: the quantized ones in no block, such as the output layer.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    cache: Args | None = None
    floats: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def layers_by_scheme(self) -> list[tuple[Scheme, list[str]]]:
        """Each scheme once, with the names of its layers."""
        found: dict[str, tuple[Scheme, list[str]]] = {}
        for name, scheme in self.schemes.items():
            found.setdefault(scheme.key, (scheme, []))[1].append(name)
        return list(found.values())


def translate(plan: Plan, reader: str) -> Translation:
    """What `plan` is in compressed-tensors, for `reader`: `transformers`, or `vllm` which runs less."""
    translation = Translation(floats=[row.name for row in plan.untouched if row.type == _LINEAR])
    for module in plan.modules:
        if module.wrapper == _LINEAR:
            _linear(module, translation, reader, plan.model.dtype)
        elif module.wrapper != _ATTENTION:
            what = f"compressed-tensors quantizes linear layers and the cache, not {module.type}"
            translation.refuse(module, what, _REMEDY)
    refuse_float_prefix(plan, translation, "compressed-tensors")
    _cache(plan, translation, reader)
    refuse_corrections(plan, translation, "compressed-tensors")
    rotated = rotated_layers(plan)
    refuse_online(plan, translation, rotated)
    _experts(plan, translation)
    dtypes = {"int": torch.int8, "float": torch.float8_e4m3fn}
    packed = (PACK, NVFP4, MXFP4)
    stored = {n: None if s.format in packed else dtypes[s.weights["type"]] for n, s in translation.schemes.items()}
    refuse_initialized(plan, translation, stored)
    schemes = translation.schemes
    asymmetric = [name for name, scheme in schemes.items() if scheme.format == PACK and not scheme.weights["symmetric"]]
    if asymmetric and (len(translation.layers_by_scheme()) > 1 or translation.cache is not None):
        what = "transformers loads packed asymmetric weights only where all layers have one spec and a float cache"
        remedy = "make them symmetric, or give every layer the same spec"
        translation.refused["", what, remedy] = asymmetric
    if reader == VLLM:
        names = checkpoint_names(plan.model.type)
        experts = [name for name in translation.floats if EXPERT_NAME.fullmatch(name)]
        if names and (unread := [name for name in experts if names.of(weight := f"{name}.weight") != weight]):
            what = f"vLLM does not read float experts of {plan.model.type} out of one tensor"
            translation.refused["", what, _READER_REMEDY] = unread
        quantized = {m: schemes[m.name] for m in plan.modules if m.name in schemes and EXPERT_NAME.fullmatch(m.name)}
        for module, scheme in quantized.items() if names and names.whole else ():
            if scheme.format != PACK or scheme.inputs is not None or not scheme.weights["symmetric"]:
                what = f"vLLM reads experts of {plan.model.type} with packed symmetric weights and float inputs alone"
                translation.refuse(module, what, _READER_REMEDY)
        for module in (module for module in plan.modules if module.name in rotated):
            if reason := rotation_refusal(module.name, module.block is None, module.has_bias):
                translation.refuse(module, reason, _ROTATION_REMEDY)
        rows = {module.name: module.weight_shape[0] for module in plan.modules if module.weight_shape}
        for where, what in fusion_refusals({**dict.fromkeys(translation.floats), **schemes}, rows):
            translation.refused.setdefault(("", what, _READER_REMEDY), []).append(where)
    return translation


def _linear(module: ModulePlan, translation: Translation, reader: str, dtype: str) -> None:
    try:
        scheme = linear_scheme({point.name: point.quant_spec for point in module.points})
    except SpecError as error:
        translation.refuse(module, str(error), _remedy(module))
        return
    reason = linear_refusal(scheme) if reader == VLLM else None
    if scheme.half_only and dtype != "bfloat16":
        what = f"compressed-tensors unpacks {scheme.format} to bfloat16, which a model in {dtype} cannot multiply"
        translation.refuse(module, what, "run with model.dtype=bfloat16")
    elif reason:
        translation.refuse(module, reason, _READER_REMEDY)
    else:
        translation.schemes[module.name] = scheme
        if module.block is None:
            translation.outside.append(module.name)


def _remedy(module: ModulePlan) -> str:
    """What to do about a linear layer that there is no scheme for."""
    specs = {point.name: point.quant_spec for point in module.points}

    def fits(point: str, spec: QuantSpec) -> bool:
        try:
            linear_scheme({**specs, point: spec})
        except SpecError:
            return False
        return True

    found = (remedy_for(spec, point == "weight", partial(fits, point)) for point, spec in specs.items())
    return next((remedy for remedy in found if remedy != ELSE), _REMEDY)


def _experts(plan: Plan, translation: Translation) -> None:
    """Experts that transformers keeps in one tensor, and puts together from other names or formats than ours."""
    modules = {module: match[2] for module in plan.modules if (match := EXPERT_NAME.fullmatch(module.name))}
    if not modules or (names := checkpoint_names(plan.model.type)) is None:
        return
    unread: dict[ModulePlan, tuple[str, str]] = {}
    kinds: dict[str, set[str]] = {}
    for expert, scheme in {**dict.fromkeys(translation.floats), **translation.schemes}.items():
        if match := EXPERT_NAME.fullmatch(expert):
            kinds.setdefault(match[1], set()).add(scheme.key if scheme else "")
    several = any(len(found) > 1 for found in kinds.values()) or len(set().union(*kinds.values()) - {""}) > 1
    for module, name in modules.items():
        if name not in names.parts:
            what = f"no reader is known here that takes experts of {plan.model.type} one by one"
            unread[module] = what, ELSE
        elif several:
            unread[module] = "transformers and vLLM take one spec for all experts", f"give all the same, {ELSE}"
        elif (scheme := translation.schemes.get(module.name)) and (reason := _unread_expert(scheme)):
            unread[module] = reason, _REMEDY
    if not unread or not any(map(can_be_taken_apart, ModelSource(plan.recipe.model).meta_model().modules())):
        return
    for module, (what, remedy) in unread.items():
        translation.refuse(module, what, remedy)


def _unread_expert(scheme: Scheme) -> str | None:
    """Why transformers does not put experts of `scheme` together, as seen with 5.17 and 5.24; None where it does."""
    weights = scheme.weights
    if scheme.inputs is not None:
        return "transformers puts experts together of weights only, and leaves their inputs float"
    if scheme.format == PACK and not weights["symmetric"]:
        return "transformers does not put experts together of weights with zero points"
    if weights["strategy"] == "block" or scheme.format in (NVFP4, MXFP8):
        name = scheme.format.partition("-")[0] if scheme.half_only else "blocks of fp8"
        return f"transformers does not put experts together of {name}"
    return None


def _cache(plan: Plan, translation: Translation, reader: str) -> None:
    attentions = [module for module in plan.modules if module.wrapper == _ATTENTION]
    for module in attentions:
        specs = {point.name: point.quant_spec for point in module.points}
        if inner := sorted(set(specs) - _CACHE_POINTS):
            translation.refuse(module, f"compressed-tensors has no word for the points {', '.join(inner)}", _REMEDY)
            continue
        try:
            arguments = cache_args(specs.get("key"), specs.get("value"))
        except SpecError as error:
            translation.refuse(module, str(error), _REMEDY)
            continue
        if reader == VLLM and (reason := cache_refusal(arguments)):
            translation.refuse(module, reason, _READER_REMEDY)
        elif translation.cache not in (None, arguments):
            translation.refuse(module, "compressed-tensors has one scheme for the caches of all blocks", _REMEDY)
        else:
            translation.cache = arguments
    if attentions and len(attentions) != plan.model.block_count:
        what = f"compressed-tensors quantizes the cache of every block or of none, here {len(attentions)} of"
        translation.refuse(attentions[0], f"{what} {plan.model.block_count}", _REMEDY)
