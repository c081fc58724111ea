"""The page of a run, made of the files that it left in its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from wrapq.pages.charts import Chart, line_chart
from wrapq.pages.parts import Column, Row, Table, duration, megabytes, percent, render, short, table
from wrapq.redact import redact
from wrapq.resolve.folding import fold
from wrapq.resolve.plan import Plan

REPORT = "report.html"
FLOAT, QUANTIZED = "float", "quantized"
_STAGES = {"float": "float model", "weights": "weights quantized", "quantized": "all quantized"}
_SIZES = {"float": "float model", "quantized": "quantized model", "export": "export"}
_FIGURES = {"output_error": "error of the output", "weight_sqnr_db": "SQNR of the weight"}
_WORST = 7  # curves that can be told apart


def render_run(folder: Path) -> str:
    """The page of the run in `folder`, finished or failed, as HTML."""
    facts = _read(folder, "run.json")
    plan = Plan.model_validate_json((folder / "plan.json").read_text(encoding="utf-8"))
    reports = _read(folder, "modules.json")
    values = _read(folder, "histograms.json")
    heat, said = _heat(reports, plan.model.blocks)
    stages = facts.get("stages", {})
    activations = _activations(values.get("activations", {}), plan.model.blocks)
    spread = _spread(values.get("weights", {}), plan.model.blocks)
    own = {
        "notes": facts.get("notes", []),
        "reason": facts.get("reason", ""),
        "stages": _stages(stages) if stages else None,
        "tokens": f"{int(stages[FLOAT]['tokens']):,}" if stages else "",
        "layers": _layers(facts.get("curves", {})),
        "heat": heat,
        "heat_text": said,
        "worst": _worst(reports),
        "activations": activations,
        "spread": spread,
        "sizes": _sizes(facts.get("sizes", {})),
        "seconds": _seconds(facts.get("seconds", {})),
        "kernels": facts.get("kernels", ""),
    }
    return render("run.html.j2", {**_head(folder, facts, plan), **own, **_plan(plan), "sections": _sections(own)})


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sections(own: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = [("failure", "Why it failed", own["reason"]), ("notes", "Notes", own["notes"])]
    shown += [("loss", "Where the loss comes from", own["stages"])]
    shown += [("values", "Weights and activations", own["activations"] or own["spread"])]
    shown += [("cost", "Size and time", True), ("plan", "Plan", True), ("recipe", "Recipe", True)]
    return [(id, name) for id, name, there in (*shown, ("record", "Record", True)) if there]


def _head(folder: Path, facts: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    recipe = redact((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        "title": f"{plan.recipe.name}: wrapq run",
        "recipe": plan.recipe,
        "description": redact(plan.recipe.description),
        "model": plan.model,
        "modules": len(plan.modules),
        "untouched": len(plan.untouched),
        "status": facts["status"],
        "when": datetime.fromtimestamp((folder / "recipe.yaml").stat().st_mtime).strftime("%d %B %Y, %H:%M"),
        "tiles": _tiles(facts, plan),
        "recipe_yaml": recipe,
        "record": _record(folder, facts),
    }


def _tiles(facts: Mapping[str, Any], plan: Plan) -> list[tuple[str, str, str]]:
    tiles = []
    if stages := facts.get("stages"):
        before, after = stages[FLOAT], stages[QUANTIZED]
        change = percent(after["perplexity"] / before["perplexity"] - 1, sign=True)
        tiles += [("Perplexity", f"{after['perplexity']:.3f}", f"{change} from {before['perplexity']:.3f}")]
        tiles += [("KL to float", f"{after['kl']:.5f}", "nats per token")]
        tiles += [("Top-1 agreement", percent(after["top1_agreement"]), "same next token as the float model")]
    if sizes := facts.get("sizes"):
        ratio = sizes[FLOAT] / sizes[QUANTIZED]
        tiles += [("Size", megabytes(sizes[QUANTIZED]), f"{ratio:.2f} times smaller than {megabytes(sizes[FLOAT])}")]
    if (bits := plan.estimate.bits_per_weight) is not None:
        tiles += [("Bits per weight", f"{bits:.2f}", "of the quantized weights, scales included")]
    if seconds := facts.get("seconds"):
        tiles += [("Time", duration(seconds["total"]), "from data to checked files")]
    return tiles


def _stages(stages: Mapping[str, Mapping[str, float]]) -> Table:
    base, worst = stages[FLOAT]["perplexity"], max(abs(stage.get("kl", 0)) for stage in stages.values())
    columns = ("stage", "perplexity", "change", "KL to float", "top-1 agreement")
    rows = []
    for name, stage in stages.items():
        change = percent(stage["perplexity"] / base - 1, sign=True) if name != FLOAT else ""
        kl = f"{stage['kl']:.5f}" if "kl" in stage else ""
        top1 = percent(stage["top1_agreement"]) if "top1_agreement" in stage else ""
        share = abs(stage.get("kl", 0)) / worst if worst else 0.0
        rows.append(Row((_STAGES.get(name, name), f"{stage['perplexity']:.3f}", change, kl, top1), share))
    named = tuple(Column(column, number=i > 0) for i, column in enumerate(columns))
    return Table("Quality after each stage", named, tuple(rows))


def _layers(curves: Mapping[str, Sequence[float]]) -> list[Chart]:
    error = line_chart("Error of each block's output", "block", "relative error",
                       _named(curves, "layer/relative_error", "error"), short)  # fmt: skip
    noise = line_chart("Signal to quantization noise of each block's output", "block", "SQNR in dB",
                       _named(curves, "layer/sqnr_db", "SQNR"), short)  # fmt: skip
    return [chart for chart in (error, noise) if chart is not None]


def _named(curves: Mapping[str, Sequence[float]], key: str, name: str) -> dict[str, Sequence[float]]:
    return {name: curves[key]} if key in curves else {}


def _place(where: str, blocks: str) -> tuple[int | None, str]:
    """The block of a point and its name in it: `(3, mlp.down_proj)`."""
    match = re.match(rf"{re.escape(blocks)}\.(\d+)\.(.*)", where) if blocks else None
    return (int(match[1]), match[2]) if match else (None, where)


def _heat(reports: Mapping[str, Mapping[str, float]], blocks: str) -> tuple[Table | None, str]:
    """A row for each kind of weight, a column for each block, the worse the darker."""
    figure = next((f for f in _FIGURES if any(f in report for report in reports.values())), "")
    grid: dict[str, dict[int, float]] = {}
    for where, report in reports.items():
        block, name = _place(where.removesuffix(".weight"), blocks)
        if block is not None and figure in report and math.isfinite(report[figure]):
            grid.setdefault(name, {})[block] = report[figure]
    if not grid:
        return None, ""
    indices = sorted({block for row in grid.values() for block in row})
    values = [value for row in grid.values() for value in row.values()]
    low, high = min(values), max(values)
    rows = []
    for name, row in grid.items():
        cells = [_figure(figure, row[i]) if i in row else "" for i in indices]
        shades = tuple(_shade(figure, row.get(i), low, high) for i in indices)
        rows.append(Row((name, *cells), shades=shades))
    columns = (Column("weight", code=True), *(Column(str(i), number=True) for i in indices))
    said = (
        "The error that rounding each weight adds to its layer's output on calibration data, relative to the output."
        if figure == "output_error"
        else "How far the signal of each rounded weight stands above its rounding noise, in dB: 6 dB are one bit."
    )
    caption = f"{_FIGURES[figure][0].upper()}{_FIGURES[figure][1:]}, by block; the darker the worse"
    return Table(caption, columns, tuple(rows), "heat"), said


def _figure(figure: str, value: float) -> str:
    return f"{value:.1f}" if figure == "weight_sqnr_db" else short(value)


def _shade(figure: str, value: float | None, low: float, high: float) -> float:
    if value is None or high == low:
        return 0.0
    if figure == "weight_sqnr_db":
        return round(0.5 * (high - value) / (high - low), 3)
    low, high, value = (math.log(max(v, 1e-12)) for v in (low, high, value))
    return round(0.5 * (value - low) / ((high - low) or 1.0), 3)


def _worst(reports: Mapping[str, Mapping[str, float]]) -> Table | None:
    figures = list(dict.fromkeys(f for report in reports.values() for f in report if f != "rows"))
    if not figures:
        return None
    order = lambda item: (-item[1].get("output_error", 0), item[1].get("weight_sqnr_db", 0))  # noqa: E731
    rows = [
        [where.removesuffix(".weight"), *(short(report[f]) if f in report else "" for f in figures)]
        for where, report in sorted(reports.items(), key=order)
    ]
    names = {"weight_sqnr_db": "SQNR of the weight, dB", "output_error": "error of the output"}
    columns = [Column("weight", code=True), *(Column(names.get(f, f.replace("_", " ")), number=True) for f in figures)]
    return table("Every rounded weight", columns, rows)


def _activations(points: Mapping[str, Mapping[str, float]], blocks: str) -> Chart | None:
    curves: dict[str, dict[int, float]] = {}
    for where, point in points.items():
        block, name = _place(where, blocks)
        if block is not None:
            curves.setdefault(name, {})[block] = point["absmax"]
    merged: dict[tuple[float, ...], list[str]] = {}
    for name, curve in curves.items():  # q, k and v see the same tensor
        merged.setdefault(tuple(curve[i] for i in sorted(curve)), []).append(name)
    listed = sorted(((_together(names), list(values)) for values, names in merged.items()), key=lambda c: -max(c[1]))
    title = "Largest magnitude of each activation"
    return line_chart(title, "block", "magnitude", dict(listed[:_WORST]), short)


def _together(names: Sequence[str]) -> str:
    """`self_attn.{q,k,v}_proj.input` in few words."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _spread(weights: Mapping[str, Mapping[str, Any]], blocks: str) -> list[dict[str, Any]]:
    """The histograms of all blocks together, by kind of weight, as heights from 0 to 100."""
    sums: dict[str, list[int]] = {}
    largest: dict[str, float] = {}
    for where, weight in weights.items():
        name = _place(where.removesuffix(".weight"), blocks)[1]
        counts = weight["counts"]
        sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(counts)), counts, strict=True)]
        largest[name] = max(largest.get(name, 0.0), weight["absmax"])
    return [
        {"name": name, "absmax": short(largest[name]), "counts": [100 * c / (max(counts) or 1) for c in counts]}
        for name, counts in sums.items()
    ]


def _sizes(sizes: Mapping[str, int]) -> Table | None:
    if not sizes:
        return None
    largest = max(sizes.values())
    rows = [Row((_SIZES.get(name, name), megabytes(size)), size / largest) for name, size in sizes.items()]
    return Table("Size of the tensors", (Column(""), Column("size", number=True)), tuple(rows))


def _seconds(seconds: Mapping[str, float]) -> Table | None:
    steps = {name: value for name, value in seconds.items() if name != "total"}
    if not steps:
        return None
    longest = max(steps.values()) or 1.0
    rows = [Row((name, duration(value)), value / longest) for name, value in steps.items()]
    return Table("Time of each step", (Column("step"), Column("time", number=True)), tuple(rows))


def _plan(plan: Plan) -> dict[str, Table]:
    rows = []
    for name, same in fold(
        plan.modules, plan.model.blocks, lambda m: m.name, lambda m: (m.type, m.weight_shape, m.points)
    ):
        module = same[0]
        for i, point in enumerate(module.points):
            rows.append(
                [name if not i else "", module.type if not i else "", point.name, point.spec, "; ".join(point.sources)]
            )
    columns = [
        Column("module", code=True),
        Column("type"),
        Column("point"),
        Column("spec", code=True),
        Column("set by"),
    ]
    stages = [
        [
            s.name,
            s.algorithm,
            s.phase,
            ", ".join(f"{key}={value}" for key, value in s.options.items()),
            f"{len(s.targets)} points",
            ", ".join(s.needs) or "no data",
            s.source,
        ]
        for s in plan.stages
    ]
    heads = ("stage", "algorithm", "phase", "options", "decides", "looks at", "set by")
    floats = [
        [name or "(the model)", same[0].type, f"{sum(u.parameters for u in same):,}", same[0].reason]
        for name, same in fold(plan.untouched, plan.model.blocks, lambda u: u.name, lambda u: (u.type, u.reason))
    ]
    left = [Column("module", code=True), Column("type"), Column("parameters", number=True), Column("why")]
    return {
        "plan": table("Quantization points", columns, rows),
        "algorithms": table("Stages", [Column(head) for head in heads], stages),
        "floats": table("Left in float", left, floats),
    }


def _record(folder: Path, facts: Mapping[str, Any]) -> Table:
    lock = folder / "recipe.lock.yaml"
    locked = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    rows = [[f"digest of {name}", digest] for name, digest in facts.get("digests", {}).items()]
    rows += [[name, str(version)] for name, version in locked.get("environment", {}).items()]
    rows += [["device", locked["device"]]] if "device" in locked else []
    return table("Digests and versions", [Column("what"), Column("value", code=True)], rows)
