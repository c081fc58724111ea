"""What stands at the top of a run's page in MLflow."""

from __future__ import annotations

from wrapq.foreign import markdown, markdown_code
from wrapq.metrics import METRICS, Measured, stage_table
from wrapq.resolve.plan import Plan


def run_note(plan: Plan, measured: Measured) -> str:
    """The recipe, the quality at each stage and the sizes, in Markdown."""
    recipe = plan.recipe
    heads, rows = stage_table(measured)
    lines = [["stage", *heads[1:]], ["---", *["---:"] * (len(heads) - 1)], *rows]
    bits = measured.bits_per_weight
    size = "" if bits is None else f"{METRICS.get('bits_per_weight').text(bits)} bits per quantized weight. "
    return "\n".join(
        [
            f"**{markdown(recipe.name)}** on {markdown_code(plan.model.path)}: {markdown(recipe.description)}",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"{size}The whole story: artifact `report.html`.",
        ]
    )
