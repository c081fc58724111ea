"""The page of a run, made of the files that it left in its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from wrapq.errors import and_more
from wrapq.html.charts import Chart, line_chart
from wrapq.html.parts import Column, Row, Table, render, short
from wrapq.metrics import FLOAT, KL, Measured, duration, megabytes, metrics, stage_table
from wrapq.redact import redact
from wrapq.resolve.listing import Listing, list_parts, list_points, list_stages, list_untouched
from wrapq.runs.folder import HISTOGRAMS, LOCK, MODULES, RECIPE
from wrapq.runs.run_record import RunRecord

_SIZES = {"float": "float model", "quantized": "quantized model"}
_ERROR, _SQNR = "output_error", "weight_sqnr_db"
_LABELS = {_ERROR: "error of the output", _SQNR: "SQNR of the weight, dB"}
_EXPLAINED = {
    _ERROR: "The error that rounding a weight adds to its layer's output on calibration data, relative to the output.",
    _SQNR: "How far the signal of each rounded weight stands above its rounding noise, in dB: 6 dB are one bit.",
}
_WORST = 7  # curves that can be told apart


def render_run(run: RunRecord) -> str:
    """The page of a run, finished or failed, as HTML."""
    folder, facts, plan = run.folder, run.facts, run.plan
    reports, values = run.optional(MODULES), run.optional(HISTOGRAMS)
    blocks, stages = plan.model.blocks, facts.get("stages", {})
    heat, heat_text = _heat(reports, blocks)
    measured = run.measured if stages else Measured(bits_per_weight=plan.estimate.bits_per_weight)
    sizes = {_SIZES.get(name, name): size for name, size in measured.sizes.items()}
    steps = {name: value for name, value in measured.seconds.items() if name != "total"}
    recipe = folder / RECIPE
    shown = {
        "title": f"{plan.recipe.name}: wrapq run",
        "recipe": plan.recipe,
        "description": redact(plan.recipe.description),
        "model": plan.model,
        "modules": len(plan.modules),
        "untouched": len(plan.untouched),
        "status": facts.get("verdict") or run.status,
        "when": datetime.fromtimestamp(recipe.stat().st_mtime).strftime("%d %B %Y, %H:%M"),
        "tiles": _tiles(measured),
        "notes": facts.get("notes", []),
        "reason": facts.get("reason", ""),
        "stages": _stages(measured) if stages else None,
        "tokens": f"{int(stages[FLOAT]['tokens']):,}" if stages else "",
        "layers": _layers(facts.get("curves", {})),
        "heat": heat,
        "heat_text": heat_text,
        "worst": _worst(reports),
        "activations": _activations(values.get("activations", {}), blocks),
        "spread": _spread(values.get("weights", {}), blocks),
        "sizes": _bars("Size of the tensors", "", "size", sizes, megabytes),
        "seconds": _bars("Time of each step", "step", "time", steps, duration),
        "exports": _exports(measured.exports),
        "kernels": facts.get("kernels", ""),
        "plan": _listed("Quantization points", list_points(plan, blocks)),
        "algorithms": _listed("Stages", list_stages(plan)),
        "floats": _listed("Left in float", list_untouched(plan, blocks)),
        "parts": _listed("Quantized by PT2E", list_parts(plan)),
        "recipe_yaml": redact(recipe.read_text(encoding="utf-8")),
        "record": _record(run),
    }
    return render("run.html.j2", {**shown, "sections": _sections(shown)})


def _sections(page: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = [("failure", "Why it failed", page["reason"]), ("notes", "Notes", page["notes"])]
    shown += [("loss", "Where the loss comes from", page["stages"])]
    shown += [("values", "Weights and activations", page["activations"] or page["spread"])]
    shown += [("cost", "Size and time", True), ("plan", "Plan", True), ("recipe", "Recipe", True)]
    return [(id, name) for id, name, there in (*shown, ("record", "Record", True)) if there]


def _tiles(measured: Measured) -> list[tuple[str, str, str]]:
    """Every figure of the quantized model, beside it what it is or how it compares with the float model's."""
    tiles = []
    for metric in metrics():
        if (value := metric.value(measured)) is not None:
            before = metric.value(measured, FLOAT) if metric.by_stage else None
            if before is None:
                note = metric.note
            elif metric.cost:
                note = f"{before / value:.2f} times smaller than {metric.text(before)}"
            else:
                note = f"{metric.text(before)} in float"
            tiles.append((f"{metric.label[0].upper()}{metric.label[1:]}", metric.text(value), note))
    return tiles


def _exports(exports: Mapping[str, Mapping[str, float]]) -> Table | None:
    """A row for each export, beneath it what the float model does in the same runtime."""
    rows: dict[str, Mapping[str, float]] = {}
    for name, figures in exports.items():
        floats = {key.removeprefix(f"{FLOAT}_"): value for key, value in figures.items() if key.startswith(f"{FLOAT}_")}
        rows |= {name: figures} | ({f"{name}, float model": floats} if floats else {})
    shown = [metric for metric in metrics() if any(metric.exported in figures for figures in rows.values())]
    columns = [Column("export"), *(Column(metric.label.removeprefix("export, "), number=True) for metric in shown)]
    cells = {name: [metric.text(figures.get(metric.exported)) for metric in shown] for name, figures in rows.items()}
    return Table("In their runtimes", columns, [Row((name, *row)) for name, row in cells.items()]) if rows else None


def _stages(measured: Measured) -> Table:
    heads, rows = stage_table(measured)
    losses = [abs(stage.get(KL, 0)) for stage in measured.stages.values()]
    bars = (loss / max(losses) if any(losses) else 0.0 for loss in losses)
    columns = [Column("stage"), *(Column(head, number=True) for head in heads[1:])]
    return Table("Quality after each stage", columns, [Row(row, bar) for row, bar in zip(rows, bars, strict=True)])


def _layers(curves: Mapping[str, Sequence[float]]) -> list[Chart]:
    shown = (
        ("layer/relative_error", "error", "Error of each block's output", "relative error"),
        ("layer/sqnr_db", "SQNR", "Signal to quantization noise of each block's output", "SQNR in dB"),
    )
    charts = (line_chart(title, "block", axis, {name: curves.get(key, ())}, short) for key, name, title, axis in shown)
    return [chart for chart in charts if chart is not None]


def _by_block(values: Mapping[str, float], blocks: str) -> dict[str, dict[int, float]]:
    """Values of points in blocks, by the name in the block, such as `mlp.down_proj`, then by the block."""
    grid: dict[str, dict[int, float]] = {}
    for where, value in values.items():
        if blocks and (match := re.match(rf"{re.escape(blocks)}\.(\d+)\.(.*)", where)):
            grid.setdefault(match[2], {})[int(match[1])] = value
    return grid


def _heat(reports: Mapping[str, Mapping[str, float]], blocks: str) -> tuple[Table | None, str]:
    """A row for each kind of weight, a column for each block, the worse the darker."""
    figure = next((f for f in _LABELS if any(f in report for report in reports.values())), "")
    measured = {where: report[figure] for where, report in reports.items() if figure in report}
    finite = {where.removesuffix(".weight"): value for where, value in measured.items() if math.isfinite(value)}
    grid = _by_block(finite, blocks)
    if not grid:
        return None, ""
    indices = sorted({block for row in grid.values() for block in row})
    values = [value for row in grid.values() for value in row.values()]
    low, high = min(values), max(values)
    show = "{:.1f}".format if figure == _SQNR else short
    rows = []
    for name, row in grid.items():
        cells = [show(row[i]) if i in row else "" for i in indices]
        rows.append(Row((name, *cells), shades=[_shade(figure, row.get(i), low, high) for i in indices]))
    columns = [Column("weight", code=True), *(Column(str(i), number=True) for i in indices)]
    caption = f"{_LABELS[figure][0].upper()}{_LABELS[figure][1:]}, by block; the darker the worse"
    return Table(caption, columns, rows, "heat"), _EXPLAINED[figure]


def _shade(figure: str, value: float | None, low: float, high: float) -> float:
    if value is None or high == low:
        return 0.0
    if figure == _SQNR:
        return round(0.5 * (high - value) / (high - low), 3)
    low, high, value = (math.log(max(v, 1e-12)) for v in (low, high, value))
    return round(0.5 * (value - low) / ((high - low) or 1.0), 3)


def _worst(reports: Mapping[str, Mapping[str, float]]) -> Table | None:
    figures = list(dict.fromkeys(f for report in reports.values() for f in report if f != "rows"))
    if not figures:
        return None
    order = lambda item: (-item[1].get(_ERROR, 0), item[1].get(_SQNR, 0))  # noqa: E731
    rows = [
        Row([where.removesuffix(".weight"), *(short(report[f]) if f in report else "" for f in figures)])
        for where, report in sorted(reports.items(), key=order)
    ]
    heads = (Column(_LABELS.get(figure, figure.replace("_", " ")), number=True) for figure in figures)
    return Table("Every rounded weight", [Column("weight", code=True), *heads], rows)


def _activations(points: Mapping[str, Mapping[str, float]], blocks: str) -> Chart | None:
    curves = _by_block({where: point["absmax"] for where, point in points.items()}, blocks)
    merged: dict[tuple[float, ...], list[str]] = {}
    for name, curve in curves.items():  # q, k and v see the same tensor
        merged.setdefault(tuple(curve[i] for i in sorted(curve)), []).append(name)
    listed = sorted(((and_more(names), list(values)) for values, names in merged.items()), key=lambda c: -max(c[1]))
    title = "Largest magnitude of each activation"
    return line_chart(title, "block", "magnitude", dict(listed[:_WORST]), short)


def _spread(weights: Mapping[str, Mapping[str, Any]], blocks: str) -> list[dict[str, Any]]:
    """The histograms of all blocks together, by kind of weight, as heights from 0 to 100."""
    sums: dict[str, list[int]] = {}
    largest: dict[str, float] = {}
    for where, weight in weights.items():
        name = where.removesuffix(".weight")
        name = re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name) if blocks else name
        counts = weight["counts"]
        sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(counts)), counts, strict=True)]
        largest[name] = max(largest.get(name, 0.0), weight["absmax"])
    return [
        {"name": name, "absmax": short(largest[name]), "counts": [100 * c / (max(counts) or 1) for c in counts]}
        for name, counts in sums.items()
    ]


def _bars(
    caption: str, head: str, figure: str, values: Mapping[str, float], show: Callable[[float], str]
) -> Table | None:
    """A row for each value, with its share of the largest as a bar."""
    largest = max(values.values(), default=0) or 1.0
    rows = [Row((name, show(value)), value / largest) for name, value in values.items()]
    return Table(caption, [Column(head), Column(figure, number=True)], rows) if rows else None


def _listed(caption: str, listing: Listing) -> Table:
    columns = [Column(head, head == "parameters", head in ("module", "spec")) for head in listing.heads]
    return Table(caption, columns, [Row(row) for row in listing.rows])


def _record(run: RunRecord) -> Table:
    rows = [[f"digest of {name}", digest] for name, digest in run.digests.items()]
    if (run.folder / LOCK).is_file():
        rows += [[name, version] for name, version in run.lock.environment.items()]
        rows.append(["device", run.lock.device])
    return Table("Digests and versions", [Column("what"), Column("value", code=True)], [Row(row) for row in rows])
