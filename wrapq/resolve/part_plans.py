"""Parts that rules hand to PT2E: their quantizers by name, and what keeps a part from being one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wrapq.calibration.pt2e_parts import PADDED
from wrapq.errors import CalibrationError, Problem, ProblemsError, and_more
from wrapq.graph.tied import tied_parameters
from wrapq.graph.usage import find_calls
from wrapq.pt2e.base import GRAPH_QUANTIZERS, GraphQuantizer
from wrapq.pt2e.part import prepare_part
from wrapq.recipe.schema import Recipe, Rule
from wrapq.registry import Place, build
from wrapq.resolve.plan import PartPlan
from wrapq.resolve.rules import Sources, lies_in

NEEDED = "torchao"
"""The package that has PT2E."""


def quantizer_of(part: PartPlan) -> GraphQuantizer:
    """The quantizer of a planned part, with its options."""
    return build(GRAPH_QUANTIZERS, part.quantizer, part.options, Place("", ""))


def check_quantizers(rules: Mapping[str, Rule], sources: Sources) -> Iterator[Problem]:
    """What is wrong with the quantizers that rules name; needs no model."""
    for name, rule in rules.items():
        if rule.by is not None:
            try:
                _quantizer(name, rule, sources)
            except ProblemsError as error:
                yield from error.problems


def _quantizer(name: str, rule: Rule, sources: Sources) -> GraphQuantizer:
    if (quantizer := rule.quantizer or "") not in GRAPH_QUANTIZERS:  # the name lies beside the options, not among them
        return build(GRAPH_QUANTIZERS, quantizer, {}, Place(f"rules.{name}", "quantizer", (), sources.of))
    return build(GRAPH_QUANTIZERS, quantizer, rule.options, Place(f"rules.{name}.options", "", (), sources.of))


def plan_parts(
    parts: Mapping[str, str],
    recipe: Recipe,
    model: nn.Module,
    sources: Sources,
    inputs: Mapping[str, Any] | None = None,
) -> tuple[tuple[PartPlan, ...], list[Problem]]:
    """The parts of `model`, on the meta device or not, and what is wrong with them.

    Args:
        parts: for each part's name the rule that hands it to PT2E.
        inputs: arguments of one small forward; a few token ids when not given.
    """
    made, quantizers = list[PartPlan](), dict[str, GraphQuantizer]()
    for name, rule in parts.items():
        quantizers[name] = quantizer = _quantizer(rule, recipe.rules[rule], sources)
        module = model.get_submodule(name)
        made.append(
            PartPlan(
                name=name,
                type=type(module).__name__,
                parameters=sum(p.numel() for p in module.parameters()),
                quantizer=GRAPH_QUANTIZERS.normalize(recipe.rules[rule].quantizer or ""),
                options=quantizer.options.model_dump(mode="json"),
                source=f"rule {rule}, {sources.of(f'rules.{rule}.by')}",
            )
        )
    return tuple(made), list(_problems(parts, quantizers, recipe, model, sources, inputs))


def part_notes(parts: Sequence[PartPlan]) -> Iterator[str]:
    """What the plan says of its parts."""
    if parts:
        names = and_more([part.name for part in parts])
        yield (
            f"{names}: calibrated for PT2E after all points are decided, so that points after it see its float output; "
            "counted as float in the size"
        )


def _problems(
    parts: Mapping[str, str],
    quantizers: Mapping[str, GraphQuantizer],
    recipe: Recipe,
    model: nn.Module,
    sources: Sources,
    inputs: Mapping[str, Any] | None,
) -> Iterator[Problem]:
    if not parts:
        return
    place = f"rules.{next(iter(parts.values()))}.by"
    if importlib.util.find_spec(NEEDED) is None:
        yield sources.problem(place, f"PT2E is in {NEEDED}, which is not installed", (), "pip install 'wrapq[pt2e]'")
        return
    if recipe.float_prefix:
        yield sources.problem(place, "PT2E knows no first tokens that stay float", (), "set float_prefix=0")
    if inputs is None and not recipe.calibration.pack:
        yield sources.problem(place, PADDED, (), "set calibration.pack=true")
    for name in parts:
        if outside := sorted(set(_tied_to(model, name))):
            what = f"{name} shares a tensor with {', '.join(outside)}, and would have one of its own"
            yield sources.problem(f"rules.{parts[name]}.match", what, (), "leave it to a rule of wrapq's own")
    for name, reason in _unexportable(model, quantizers, inputs):
        yield sources.problem(f"rules.{parts[name]}.match", f"{name}: {reason}", (), "match a part of it, or another")


def _tied_to(model: nn.Module, part: str) -> Iterator[str]:
    for places in tied_parameters(model):
        inside = [lies_in(name, part) for name, _ in places]
        if any(inside) and not all(inside):
            yield from (f"{name}.{key}" for (name, key), own in zip(places, inside, strict=True) if not own)


def _unexportable(
    model: nn.Module, quantizers: Mapping[str, GraphQuantizer], inputs: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    """Which of the parts PT2E does not take, and why, from one forward with `inputs`; none where there is no forward on
    the meta device, and calibration finds out."""
    if (calls := find_calls(model, quantizers, inputs)) is None:
        return
    for name, quantizer in quantizers.items():
        if name not in calls:
            yield name, "no forward of the model comes there, so that PT2E would see no data"
            continue
        module = model.get_submodule(name)
        device = next((p.device for p in module.parameters()), None)  # ids are on none where weights have no values
        args, kwargs = tree_map(lambda v, to=device: v.to(to) if isinstance(v, Tensor) and to else v, calls[name])
        try:
            prepare_part(module, args, kwargs, quantizer)
        except CalibrationError as error:
            yield name, str(error)
