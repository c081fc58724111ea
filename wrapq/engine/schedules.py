"""What the schedule that a recipe does not ask for would give, next to what the one that it asks for gives."""

from __future__ import annotations

from torch import nn

from wrapq.calibration.data import Samples
from wrapq.calibration.walker import Schedule
from wrapq.engine.calibrate import make_batches, make_walker, offloading
from wrapq.engine.context import Run
from wrapq.engine.measure import QUANTIZED, Quality, measure_stages
from wrapq.engine.transform import transform
from wrapq.resolve.model import ModelSource
from wrapq.wrappers.model import wrap_model


def compare_schedules(
    run: Run, source: ModelSource, calibration: Samples | None, evaluation: Samples, quality: Quality | None
) -> None:
    """State what the recipe's schedule costs or gains next to the other one, where it asks for that."""
    recipe = run.plan.recipe
    if calibration is None or not recipe.evaluation.compare_schedules:
        return
    model = source.load(run.device)
    transform(run, model, source, calibration)
    model = wrap_model(model, run.plan.specs())
    other = _calibrate_otherwise(run, model, calibration)
    if quality is None:
        return
    with run.step("evaluate_otherwise", f"Measuring quality with {other} calibration"):
        found = measure_stages(model, evaluation, recipe.evaluation.batch_size, lambda: None).stages[QUANTIZED]
    run.tracker.metrics({f"{other}/{name}": value for name, value in found.items() if name != "tokens"})
    said = {recipe.calibration.schedule: quality.stages[QUANTIZED], other: found}
    run.note("; ".join(f"{name}: perplexity {m['perplexity']:.3f}, KL {m['kl']:.5f}" for name, m in said.items()))


def _calibrate_otherwise(run: Run, model: nn.Module, samples: Samples) -> Schedule:
    """Decide every point of a wrapped model under the schedule that the recipe does not ask for: which that is.

    Statistics are read from the store and kept there like those of the run itself; nothing is put aside for resuming.
    """
    config = run.plan.recipe.calibration
    other: Schedule = "parallel" if config.schedule == "sequential" else "sequential"
    walker = make_walker(run, model, looks_at_data=True)
    with (
        run.step("calibrate_otherwise", f"Calibrating {other}", *walker.steps()) as advance,
        offloading(run, walker) as offload,
    ):
        walker.advance, walker.offload = advance, offload
        walker.run(make_batches(samples, config.batch_size, run.device), other)
    return other
