"""What jobs of a sweep have in common: weights that one of them rounds for the others on one factorization."""

from __future__ import annotations

from collections.abc import Sequence

from wrapq.quant.spec import QuantSpec
from wrapq.resolve.plan import Plan


def specs_in_common(plan: Plan, later: Sequence[Plan]) -> dict[str, list[QuantSpec]]:
    """For each weight of `plan` that is rounded by what the data shows, the specs, other than its own, that `later`
    plans have for it where they see the same and round by the same algorithm; by the point's full name.

    They see the same where nothing that was quantized before changes it: in the schedule `parallel`, without
    transforms, which look at the specs.
    """
    found: dict[str, list[QuantSpec]] = {}
    mine, own = _rounding(plan), _specs(plan)
    for other in later if _sees(plan) else ():
        if _sees(other) == _sees(plan):
            specs = _specs(other)
            for point, algorithm in _rounding(other).items():
                known = [own[point], *found.get(point, ())] if mine.get(point) == algorithm else [specs[point]]
                if specs[point] not in known and not specs[point].global_scale:
                    found.setdefault(point, []).append(specs[point])
    return found


def _sees(plan: Plan) -> object:
    """Equal for plans whose weights are rounded by the same statistics; None where these are no other plan's."""
    recipe = plan.recipe
    if recipe.calibration.schedule != "parallel" or any(stage.phase == "transform" for stage in plan.stages):
        return None
    return recipe.model, recipe.calibration


def _rounding(plan: Plan) -> dict[str, object]:
    """What rounds each weight by what the data shows, by the point's full name."""
    stages = [stage for stage in plan.stages if stage.phase == "round" and stage.needs]
    return {point: (stage.algorithm, stage.options) for stage in stages for point in stage.targets}


def _specs(plan: Plan) -> dict[str, QuantSpec]:
    return {f"{module.name}.{point.name}": point.quant_spec for module in plan.modules for point in module.points}
