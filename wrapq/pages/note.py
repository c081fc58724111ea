"""What stands at the top of a run's page in MLflow."""

from __future__ import annotations

from collections.abc import Mapping

from wrapq.pages.parts import megabytes, percent
from wrapq.resolve.plan import Plan


def run_note(plan: Plan, stages: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> str:
    """The recipe, the quality at each stage and the sizes, in Markdown."""
    base = next(iter(stages.values()))["perplexity"]
    lines = [
        f"**{plan.recipe.name}** on `{plan.model.path}`: {plan.recipe.description}",
        "",
        "| stage | perplexity | change | KL to float | top-1 agreement | size |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage, metrics in stages.items():
        change = percent(metrics["perplexity"] / base - 1, sign=True) if "kl" in metrics else ""
        kl = f"{metrics['kl']:.5f}" if "kl" in metrics else ""
        top1 = percent(metrics["top1_agreement"]) if "top1_agreement" in metrics else ""
        size = megabytes(sizes[stage]) if stage in sizes else ""
        lines.append(f"| {stage} | {metrics['perplexity']:.3f} | {change} | {kl} | {top1} | {size} |")
    bits = plan.estimate.bits_per_weight
    lines += ["", f"{bits:.2f} bits per quantized weight. " if bits is not None else ""]
    lines[-1] += "The whole story: artifact `report.html`."
    return "\n".join(lines)
