"""The plan as rows of text, from which terminal and pages lay out the same tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wrapq.resolve.folding import fold
from wrapq.resolve.plan import Plan


class Listing(NamedTuple):
    """Rows of text under the heads of their columns."""

    heads: tuple[str, ...]
    rows: list[list[str]]


def list_points(plan: Plan, prefix: str) -> Listing:
    """Every quantization point, modules that differ only in the block under `prefix` being one."""
    rows = []
    for name, (module, *_) in fold(
        plan.modules, prefix, lambda m: m.name, lambda m: (m.type, m.weight_shape, m.points)
    ):
        kind = module.type if module.type == module.wrapper else f"{module.type} as {module.wrapper}"
        heads = [[name, kind], *[["", ""]] * (len(module.points) - 1)]
        for head, point in zip(heads, module.points, strict=True):
            rows.append([*head, point.name, point.spec, "; ".join(point.sources)])
    return Listing(("module", "type", "point", "spec", "set by"), rows)


def list_untouched(plan: Plan, prefix: str) -> Listing:
    """The modules left in float, and why."""
    rows = [
        [name or "(the model)", same[0].type, f"{sum(row.parameters for row in same):,}", same[0].reason]
        for name, same in fold(plan.untouched, prefix, lambda u: u.name, lambda u: (u.type, u.reason))
    ]
    return Listing(("module", "type", "parameters", "why"), rows)


def list_parts(plan: Plan) -> Listing:
    """The modules that PT2E quantizes."""
    rows = [
        [part.name or "(the model)", part.type, f"{part.parameters:,}", str(part), part.source] for part in plan.parts
    ]
    return Listing(("module", "type", "parameters", "quantizer", "set by"), rows)


def list_stages(plan: Plan) -> Listing:
    """The stack in the order in which it runs."""
    rows = [
        [
            stage.name,
            with_options(stage.algorithm, stage.options),
            stage.phase,
            f"{len(stage.targets)} {'places' if stage.phase == 'transform' else 'points'}",
            ", ".join(stage.needs) or "no data",
            stage.source,
        ]
        for stage in plan.stages
    ]
    return Listing(("stage", "algorithm", "phase", "decides", "looks at", "set by"), rows)


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """`gptq(damp=0.01, act_order=True)`, or the name alone."""
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({listed})" if listed else name
