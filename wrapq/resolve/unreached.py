"""Points that no forward reaches: what rules say of them is taken back, and the plan says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from wrapq.errors import and_more
from wrapq.graph.usage import find_usage
from wrapq.resolve.plan import ModulePlan, PointPlan, Untouched

_READ = "the model reads the weight and calls no module, so that activations there stay float"
_IDLE = "no forward of tokens comes there, so that activations stay float"


def leave_unreached(
    model: nn.Module, modules: Sequence[ModulePlan], inputs: Mapping[str, Any] | None = None
) -> tuple[tuple[ModulePlan, ...], tuple[Untouched, ...], list[str]]:
    """`modules` without the activation points that would see no data in calibration, since `model` calls
    the modules nowhere in a forward with `inputs`, or a few token ids; those of which nothing is left; and what the
    plan says of all.

    Where no forward is possible, as may be on the meta device, calibration finds out.
    """
    needing = {module.name for module in modules if any(map(_needs_data, module.points))}
    if not needing or (usage := find_usage(model, needing, inputs)) is None:
        return tuple(modules), (), []
    idle = needing - usage.called
    kept, left = list[ModulePlan](), list[Untouched]()
    reasons: dict[str, list[str]] = {}
    for module in modules:
        if module.name in idle:
            reason = _READ if module.name in usage.read else _IDLE
            reasons.setdefault(reason, []).append(module.name)
            module = module.model_copy(update={"points": tuple(p for p in module.points if not _needs_data(p))})
            if not module.points:
                own = sum(p.numel() for p in model.get_submodule(module.name).parameters(recurse=False))
                left.append(Untouched(name=module.name, type=module.type, parameters=own, reason=reason))
                continue
        kept.append(module)
    return tuple(kept), tuple(left), [f"{and_more(names)}: {reason}" for reason, names in reasons.items()]


def _needs_data(point: PointPlan) -> bool:
    return point.role == "activation" and not point.quant_spec.dynamic
