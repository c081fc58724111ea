"""Comparison of the recipe's schedule with the other one."""

from __future__ import annotations

from wrapq.calibration.walker import Schedule
from wrapq.data.samples import Samples
from wrapq.engine.apply_transforms import transform
from wrapq.engine.calibrate import calibrate_parts, make_batches, walk
from wrapq.engine.context import Run
from wrapq.engine.measure import Quality, measure_stages
from wrapq.metrics import QUANTIZED
from wrapq.runs.checkpoint import load_float
from wrapq.wrappers.model import wrap_model


def compare_schedules(run: Run, calibration: Samples | None, evaluation: Samples, quality: Quality | None) -> None:
    """Note the quality of both schedules, where `evaluation.compare_schedules` is set.

    Statistics are read from the store and kept there like those of the run itself; nothing is put aside for resuming.
    """
    recipe = run.plan.recipe
    if calibration is None or not recipe.evaluation.compare_schedules:
        return
    model = load_float(run.source, run.device)
    transform(run, model, calibration)
    model = wrap_model(model, run.plan.specs())
    other: Schedule = "parallel" if recipe.calibration.schedule == "sequential" else "sequential"
    walk(run, model, make_batches(run, calibration), other, "calibrate_otherwise", f"Calibrating {other}")
    if quality is None:
        return
    if run.plan.parts:
        calibrate_parts(run, model, calibration)
    with run.step("evaluate_otherwise", f"Measuring quality with {other} calibration"):
        metrics = measure_stages(model, evaluation, recipe.evaluation.batch_size, lambda: None).stages[QUANTIZED]
    run.tracker.metrics({f"{other}/{name}": value for name, value in metrics.items() if name != "tokens"})
    results = {recipe.calibration.schedule: quality.stages[QUANTIZED], other: metrics}
    run.note("; ".join(f"{name}: perplexity {m['perplexity']:.3f}, KL {m['kl']:.5f}" for name, m in results.items()))
