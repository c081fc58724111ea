"""The plan as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from wrapq.resolve.exporter import Exporter, make_exporter
from wrapq.resolve.folding import fold
from wrapq.resolve.plan import ModulePlan, Plan

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
    yield _modules(plan, prefix)
    if plan.untouched:
        yield _untouched(plan, prefix)
    yield _stages(plan)
    if plan.notes:
        yield Text("\n".join(f"note: {note}" for note in plan.notes))
    if (exporter := make_exporter(plan.recipe.export)) is not None:
        yield _export(plan, exporter)
    yield _estimates(plan)


def _modules(plan: Plan, prefix: str) -> Table:
    table = _table("quantized", "module", "type", "point", "spec", "set by")
    for name, rows in fold(plan.modules, prefix, lambda m: m.name, _likeness):
        module = rows[0]
        for i, point in enumerate(module.points):
            kind = module.type if module.type == module.wrapper else f"{module.type} as {module.wrapper}"
            head = (name, kind) if i == 0 else ("", "")
            table.add_row(*head, point.name, point.spec, "; ".join(point.sources))
    return table


def _likeness(module: ModulePlan) -> tuple[object, ...]:
    return module.type, module.weight_shape, module.points


def _untouched(plan: Plan, prefix: str) -> Table:
    table = _table("left in float", "module", "type", "parameters", "why")
    for name, rows in fold(plan.untouched, prefix, lambda u: u.name, lambda u: (u.type, u.reason)):
        table.add_row(name or "(the model)", rows[0].type, f"{sum(row.parameters for row in rows):,}", rows[0].reason)
    return table


def _stages(plan: Plan) -> Table:
    table = _table("stages", "stage", "algorithm", "phase", "decides", "looks at", "set by")
    for stage in plan.stages:
        needs = ", ".join(stage.needs) or "no data"
        table.add_row(
            stage.name,
            _called(stage.algorithm, stage.options),
            stage.phase,
            f"{len(stage.targets)} {'places' if stage.phase == 'transform' else 'points'}",
            needs,
            stage.source,
        )
    return table


def _export(plan: Plan, exporter: Exporter) -> Text:
    """Which format is written, and what it says a little differently; what it cannot say has been refused."""
    said = _called(plan.recipe.export.format, exporter.options.model_dump())
    notes = (f"note: {note}" for note in exporter.notes(plan))
    return Text("\n  ".join([f"export {said}", *exporter.layers(plan), *notes]))


def _called(name: str, options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name}({listed})" if listed else name


def _estimates(plan: Plan) -> Text:
    e = plan.estimate
    bits = (
        f"{e.bits_per_weight:.2f} bits per quantized weight"
        if e.bits_per_weight is not None
        else "no weights quantized"
    )
    tokens = f"{e.calibration_tokens:,} calibration tokens" if e.calibration_tokens else "no calibration data"
    return Text(
        f"size {megabytes(e.float_bytes)} -> {megabytes(e.quantized_bytes)}, {bits}; {tokens}; "
        f"peak memory about {megabytes(e.peak_bytes)}\n"
        f"recipe {plan.recipe.digest()[:_SHORT]}, plan {plan.digest()[:_SHORT]}"
    )


def megabytes(size: float) -> str:
    """Bytes as `12.3 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
