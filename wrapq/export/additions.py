"""What a plan puts beside weights, which a format that names tensors of a known model has no place for."""

from __future__ import annotations

from collections.abc import Collection

from wrapq.algorithms.base import ALGORITHMS, Corrector
from wrapq.algorithms.transform import Transform
from wrapq.export.base import Refusals
from wrapq.resolve.plan import Plan


def refuse_corrections(plan: Plan, refusals: Refusals, name: str) -> None:
    """Refuse what the stack adds beside the weights, which the model that a reader of the format `name` builds has no
    place for."""
    modules = {f"{module.name}.weight": module for module in plan.modules}
    for stage in plan.stages:
        kind = ALGORITHMS.get(stage.algorithm)
        for module in (modules[target] for target in stage.targets if issubclass(kind, Corrector)):
            remedy = f"leave it out with ~stack.{stage.name}, or run with export=none"
            if issubclass(kind, Corrector) and kind.adds == "low_rank":
                what = f"{name} has no word for a low-rank repair beside the weight"
                refusals.refuse(module, what, remedy)
            elif not module.has_bias:
                refusals.refuse(module, "it has no bias, and readers would drop the one of the correction", remedy)


def refuse_online(plan: Plan, refusals: Refusals, expressed: Collection[str] = ()) -> None:
    """Refuse what changes at each forward, which a reader that builds the model anew would not do, but for rotations of
    the inputs of the modules `expressed`, which the format has a word for."""
    modules = {module.name: module for module in plan.modules}
    for stage in plan.stages:
        for name in (name for name in stage.online if name not in stage.hadamard or name not in expressed):
            kind = ALGORITHMS.get(stage.algorithm)
            option = f"as with stack.{stage.name}.{kind.offline}, " if issubclass(kind, Transform) else ""
            what = f"{stage.name} changes what comes to it at each forward, and readers would drop that"
            remedy = f"leave it out, {option}or run with export=none"
            if name in modules:  # else it reads the tensor that others are given divided
                refusals.refuse(modules[name], what, remedy)


def refuse_float_prefix(plan: Plan, refusals: Refusals, name: str) -> None:
    """Refuse first tokens that stay float, for a format called `name`."""
    if plan.recipe.float_prefix:
        what = f"{name} has no word for first tokens that stay float, and readers would quantize them"
        refusals.refused[("", what, "run with float_prefix=0, or with export=none")] = ["float_prefix"]
