"""What static 8-bit inputs cost the model whose channels have outliers, as large models have them."""

from __future__ import annotations

from pathlib import Path

import wrapq


def loss(recipe: str, shared_models: Path, outputs: Path, *more: str) -> float:
    """How much more perplexity, relative to float, `recipe` with the overrides `more` gives `tiny-llama-outlier`."""
    texts = shared_models.parent / "data"
    overrides = ["model=hf", f"model.path={shared_models}/tiny-llama-outlier", f"paths.outputs={outputs}"]
    overrides += ["calibration=text", f"calibration.path={texts}/calib.txt", "calibration.samples=8"]
    overrides += ["calibration.seq_len=256", "evaluation=text", f"evaluation.path={texts}/test.txt"]
    overrides += ["evaluation.tokens=4096", "evaluation.seq_len=256", "tracking=none"]
    metrics = wrapq.run(recipe, [*overrides, *more]).metrics
    return metrics["quantized"]["perplexity"] / metrics["float"]["perplexity"] - 1
