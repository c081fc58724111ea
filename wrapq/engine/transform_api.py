"""Transforms from Python: on any prepared module, which is float again meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from wrapq.calibration.algorithm import Transform
from wrapq.calibration.forward import Batch
from wrapq.calibration.processes import Processes
from wrapq.calibration.surgery import Surgeon
from wrapq.engine.transform import Figures, checked, walk
from wrapq.errors import CalibrationError, ModelError, PlanError, Problem
from wrapq.resolve.transforms import Transforms
from wrapq.wrappers.experts import take_apart
from wrapq.wrappers.model import Specs, iter_wrapped, unwrap_model, wrap_model

_EXAMPLE_TOKENS = 4


def transform_prepared(
    model: nn.Module, transforms: Mapping[str, Transform], batches: Sequence[Batch]
) -> tuple[dict[str, Figures], list[str]]:
    """Run `transforms`, by the names of their stages and in order, on a prepared model in place.

    Returns what each reports, by stage and target, and what else is to be said, see `Surgeon.notes`.

    Raises:
        PlanError: one has nothing to do or cannot run where it stands; before anything is changed.
        ModelError: one changed the model's function; what it did is undone.
    """
    if not batches:
        raise CalibrationError("transforms need at least one batch, to follow the model and to compare its outputs")
    specs = {
        name: {point: quantizer.spec for point, quantizer in module.point_quantizers().items()}
        for name, module in iter_wrapped(model)
    }
    if "" in specs:
        raise PlanError([Problem("calibrate", "transforms change modules that follow each other; this model is one")])
    figures: dict[str, Figures] = {}
    with _float(model, specs):
        take_apart(model, specs)
        plan = Transforms(model, specs, example(batches[0]))
        targets = _find(plan, transforms)
        surgeon = Surgeon(model, plan.graph, specs)
        for name, transform in transforms.items():
            with checked(surgeon, batches[0], name, transform.band):
                figures[name] = walk(surgeon, transform, targets[name], batches, Processes())
    return figures, surgeon.notes


def example(batch: Batch) -> dict[str, Any]:
    """A few tokens of one text of `batch`, enough to follow the model; all of it where it is not of token ids."""
    ids = batch.inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return dict(batch.inputs)
    return {
        name: value[:1, :_EXAMPLE_TOKENS] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in batch.inputs.items()
    }


@contextmanager
def _float(model: nn.Module, specs: Specs) -> Iterator[None]:
    unwrap_model(model)
    try:
        yield
    finally:
        wrap_model(model, specs)


def _find(plan: Transforms, transforms: Mapping[str, Transform]) -> dict[str, tuple[str, ...]]:
    targets, problems = {}, []
    for name, transform in transforms.items():
        kind = type(transform).__name__
        try:
            found = plan.ask(name, kind, transform, None)
            problems += list(plan.check(name, kind, transform, found, f"stack.{name}"))
            targets[name] = found.targets
        except ModelError as error:
            problems.append(Problem(f"stack.{name}", f"{kind} cannot follow this model: {error}"))
    if problems:
        raise PlanError(problems)
    return targets
