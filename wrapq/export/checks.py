"""A plan in the words of compressed-tensors, with every refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from wrapq.calibration.algorithm import ALGORITHMS, Corrector
from wrapq.errors import Problem, SpecError
from wrapq.export.scheme import INT, Args, Scheme, cache_args, linear_scheme
from wrapq.export.vllm import cache_refusal, fusion_refusals, linear_refusal
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import ModulePlan, Plan
from wrapq.wrappers.experts import can_be_taken_apart

VLLM = "vllm"
_REMEDY = "quantize it otherwise, leave it float, or run with export=none"
_READER_REMEDY = "quantize it otherwise, or give vLLM up with export.reader=transformers"
_LINEAR, _ATTENTION = "Linear", "Attention"
_CACHE_POINTS = {"key", "value"}


@dataclass
class Translation:
    """A plan as compressed-tensors says it.

    Attributes:
        schemes: the scheme of every quantized linear layer, by name.
        cache: the `kv_cache_scheme`, None where the cache stays float.
        floats: the linear layers left float.
        outside: the quantized ones in no block, such as the output layer.
        problems: what could not be said.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    cache: Args | None = None
    floats: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def translate(plan: Plan, reader: str) -> Translation:
    """What `plan` is in compressed-tensors, for `reader`: `transformers`, or `vllm` which runs less."""
    said = Translation(floats=[row.name for row in plan.untouched if row.type == _LINEAR])
    refused = _Refusals()
    for module in plan.modules:
        if module.wrapper == _LINEAR:
            _linear(module, said, refused, reader, plan.recipe.model.dtype)
        elif module.wrapper != _ATTENTION:
            what = f"compressed-tensors quantizes linear layers and the cache, not {module.type}"
            refused.add(module, what, _REMEDY)
    _cache(plan, said, refused, reader)
    _corrections(plan, refused)
    _online(plan, refused)
    _experts(plan, said, refused)
    said.problems += refused.problems()
    said.problems += _loading(said)
    if reader == VLLM:
        layers = {**dict.fromkeys(said.floats), **said.schemes}
        unequal = dict[str, list[str]]()
        rows = {module.name: module.weight_shape[0] for module in plan.modules if module.weight_shape}
        for where, what in fusion_refusals(layers, rows):
            unequal.setdefault(what, []).append(where)
        said.problems += [Problem("", _several(names, what), (), _READER_REMEDY) for what, names in unequal.items()]
    return said


def _linear(module: ModulePlan, said: Translation, refused: _Refusals, reader: str, dtype: str) -> None:
    try:
        scheme = linear_scheme({point.name: point.quant_spec for point in module.points})
    except SpecError as error:
        refused.add(module, str(error), _REMEDY)
        return
    reason = linear_refusal(scheme) if reader == VLLM else None
    if scheme.half_only and dtype != "bfloat16":
        what = f"compressed-tensors unpacks {scheme.format} to bfloat16, which a model in {dtype} cannot multiply"
        refused.add(module, what, "run with model.dtype=bfloat16")
    elif reason:
        refused.add(module, reason, _READER_REMEDY)
    else:
        said.schemes[module.name] = scheme
        if module.block is None:
            said.outside.append(module.name)


def _corrections(plan: Plan, refused: _Refusals) -> None:
    """What the stack adds beside the weights and the model that a reader builds has no place for."""
    modules = {f"{module.name}.weight": module for module in plan.modules}
    for stage in plan.stages:
        kind = ALGORITHMS.get(stage.algorithm)
        for module in (modules[target] for target in stage.targets if issubclass(kind, Corrector)):
            remedy = f"leave it out with ~stack.{stage.name}, or run with export=none"
            if issubclass(kind, Corrector) and kind.adds == "low_rank":
                refused.add(module, "compressed-tensors has no word for a low-rank repair beside the weight", remedy)
            elif not module.has_bias:
                refused.add(module, "it has no bias, and readers would drop the one of the correction", remedy)


def _online(plan: Plan, refused: _Refusals) -> None:
    """What changes at each forward, which a reader that builds the model anew would not do."""
    modules = {module.name: module for module in plan.modules}
    for stage in plan.stages:
        for name in stage.online:
            what = f"{stage.name} turns what comes to it at each forward, and readers would drop that"
            remedy = f"leave it out, as with stack.{stage.name}.rotations=[R1,R2], or run with export=none"
            refused.add(modules[name], what, remedy)


def _experts(plan: Plan, said: Translation, refused: _Refusals) -> None:
    """Experts that transformers keeps in one tensor, and puts together from other names or formats than ours."""
    modules = {
        module: match[1] for module in plan.modules if (match := re.search(r"\.experts\.\d+(\..*)", module.name))
    }
    if _class_of(plan.model.type) is None:
        return  # a model with code of its own
    unread: dict[ModulePlan, str] = {}
    for module, name in modules.items():
        if f".experts.*{name}.weight" not in _merged(plan.model.type):
            unread[module] = f"transformers does not put experts of {plan.model.type} together from this name"
        elif module.name in said.schemes and said.schemes[module.name].format == INT:
            # as seen with 5.17 and 5.24; it does those of the other formats
            unread[module] = "transformers does not put experts together of 8-bit integers and such inputs"
    if not unread or not any(map(can_be_taken_apart, ModelSource(plan.recipe.model).meta_model().modules())):
        return
    for module, reason in unread.items():
        refused.add(module, reason, _REMEDY)


def _class_of(model: str) -> Any:
    import transformers

    return getattr(transformers, model, None)


@cache
def _merged(model: str) -> frozenset[str]:
    """The ends of the names from which transformers makes the one tensor of a model's experts."""
    from transformers import conversion_mapping

    found = conversion_mapping.get_checkpoint_conversion_mapping(_class_of(model).config_class.model_type)
    sources = (getattr(step, "source_patterns", ()) for step in found or ())
    patterns = [pattern for its in sources for pattern in ([its] if isinstance(its, str) else its)]
    return frozenset(pattern[pattern.index(".experts.") :] for pattern in patterns if ".experts." in pattern)


def _cache(plan: Plan, said: Translation, refused: _Refusals, reader: str) -> None:
    attentions = [module for module in plan.modules if module.wrapper == _ATTENTION]
    for module in attentions:
        specs = {point.name: point.quant_spec for point in module.points}
        if inner := sorted(set(specs) - _CACHE_POINTS):
            refused.add(module, f"compressed-tensors has no word for the points {', '.join(inner)}", _REMEDY)
            continue
        try:
            arguments = cache_args(specs.get("key"), specs.get("value"))
        except SpecError as error:
            refused.add(module, str(error), _REMEDY)
            continue
        if reader == VLLM and (reason := cache_refusal(arguments)):
            refused.add(module, reason, _READER_REMEDY)
        elif said.cache is not None and said.cache != arguments:
            refused.add(module, "compressed-tensors has one scheme for the caches of all blocks", _REMEDY)
        else:
            said.cache = arguments
    if attentions and len(attentions) != plan.model.block_count:
        what = f"compressed-tensors quantizes the cache of every block or of none, here {len(attentions)} of"
        refused.add(attentions[0], f"{what} {plan.model.block_count}", _REMEDY)


def _loading(said: Translation) -> Iterator[Problem]:
    """What transformers cannot load although the format says it."""
    asymmetric = [name for name, scheme in said.schemes.items() if scheme.asymmetric_pack]
    if asymmetric and (len({scheme.key for scheme in said.schemes.values()}) > 1 or said.cache is not None):
        what = "transformers loads packed asymmetric weights only where all layers have one spec and a float cache"
        yield Problem("", _several(asymmetric, what), (), "make them symmetric, or give every layer the same spec")


class _Refusals:
    """Refusals with one reason for many modules, told once."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, str], list[str]] = {}

    def add(self, module: ModulePlan, what: str, remedy: str) -> None:
        """Refuse `module`, for the reason `what`."""
        said = " + ".join(dict.fromkeys(point.sources[-1] for point in module.points if point.sources))
        self._names.setdefault((said, what, remedy), []).append(module.name)

    def problems(self) -> Iterator[Problem]:
        """A problem for each reason and source."""
        for (where, what, remedy), names in self._names.items():
            yield Problem(where, _several(names, what), (), remedy)


def _several(names: list[str], what: str) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}"
