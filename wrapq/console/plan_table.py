"""The plan as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from wrapq.console.plain_table import plain_table
from wrapq.export.base import Exporter, make_exporters
from wrapq.metrics import megabytes
from wrapq.resolve.listing import list_parts, list_points, list_stages, list_untouched, with_options
from wrapq.resolve.plan import Plan

_SHORT = 12  # digits of a digest that are shown


def plan_tables(plan: Plan, full: bool = False) -> Iterator[RenderableType]:
    """The plan's head, modules, untouched modules, stages, export and estimates.

    Args:
        plan: the plan.
        full: a line for every module, instead of one for all blocks alike.
    """
    model = plan.model
    blocks = f", {model.block_count} blocks in {model.blocks}" if model.block_count else ""
    yield Text.assemble(
        (plan.recipe.name, "bold"), f"  {plan.recipe.description}\n",
        f"model {model.path}: {model.type}, {model.parameters / 1e6:.1f}M parameters{blocks}",
    )  # fmt: skip
    prefix = "" if full else model.blocks
    yield plain_table("quantized", *list_points(plan, prefix))
    if (parts := list_parts(plan)).rows:
        yield plain_table("quantized by PT2E", *parts)
    if (untouched := list_untouched(plan, prefix)).rows:
        yield plain_table("left in float", *untouched)
    yield plain_table("stages", *list_stages(plan))
    if plan.notes:
        yield Text("\n".join(f"note: {note}" for note in plan.notes))
    for name, exporter in make_exporters(plan.recipe.export).items():
        yield _export(plan, name, exporter)
    yield _estimates(plan)


def _export(plan: Plan, name: str, exporter: Exporter) -> Text:
    """The export format with its options, its layers and notes on what it expresses differently."""
    named = with_options(name, exporter.options.model_dump())
    notes = (f"note: {note}" for note in exporter.notes(plan))
    return Text("\n  ".join([f"export {named}", *exporter.layers(plan), *notes]))


def _estimates(plan: Plan) -> Text:
    e = plan.estimate
    bits = "no weights quantized"
    if e.bits_per_weight is not None:
        bits = f"{e.bits_per_weight:.2f} bits per quantized weight"
    tokens = f"{e.calibration_tokens:,} calibration tokens" if e.calibration_tokens else "no calibration data"
    return Text(
        f"size {megabytes(e.float_bytes)} -> {megabytes(e.quantized_bytes)}, {bits}; {tokens}; "
        f"peak memory about {megabytes(e.peak_bytes)}\n"
        f"recipe {plan.recipe.digest()[:_SHORT]}, plan {plan.digest()[:_SHORT]}"
    )
