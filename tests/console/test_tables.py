"""What the tables of plans and results say."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from wrapq.console.plan_table import plan_tables
from wrapq.console.run_summary import ConsoleProgress, quality_table, show_result
from wrapq.engine.record import RunResult
from wrapq.metrics import Measured, megabytes
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve

STAGES = {
    "float": {"perplexity": 20.0, "nll": 3.0, "tokens": 2040.0},
    "weights": {"perplexity": 20.5, "nll": 3.01, "tokens": 2040.0, "kl": 0.01234, "top1_agreement": 0.95},
    "quantized": {"perplexity": 21.0, "nll": 3.02, "tokens": 2040.0, "kl": 0.02, "top1_agreement": 0.9},
}


def text(*parts: RenderableType) -> str:
    console = Console(file=StringIO(), width=200, highlight=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def plan(*overrides: str) -> Plan:
    composed = compose(overrides)
    return resolve(composed.recipe, composed.sources)


def lines_of(said: str, *starts: str) -> list[str]:
    return [" ".join(line.split()) for line in said.splitlines() if line.startswith(starts)]


def test_plan_names_module_type_point_spec_and_source() -> None:
    made = plan("recipe=w8a8_static", "rules.linear.weight=int8:channel", "rules.linear.input=int8:tensor")
    said = text(*plan_tables(made))
    assert lines_of(said, "model.layers.{0-3}.mlp.down_proj") == [
        "model.layers.{0-3}.mlp.down_proj Linear weight int8:channel:sym "
        "rule linear, override rules.linear.weight=int8:channel"
    ]
    assert "input int8:tensor:sym rule linear, override rules.linear.input=int8:tensor" in " ".join(said.split())


def test_plan_lists_what_stays_float_and_why() -> None:
    said = text(*plan_tables(plan("recipe=w8a8_static")))
    assert lines_of(said, "lm_head", "model.embed") == [
        "model.embed_tokens Embedding 524,288 no rule",
        "lm_head Linear 524,288 rule head",
    ]


def test_plan_lists_stages_in_order_with_what_they_look_at() -> None:
    said = text(*plan_tables(plan("recipe=w8a8_static", "rules.linear.input.observer=percentile")))
    assert lines_of(said, "ranges ", "round ") == [
        "ranges ranges range 28 points percentile conf/algorithm/ranges.yaml:2",
        "round gptq(damp=0.01, act_order=True, ranges=best, asymmetric=0.0, sweeps=0, gradient=False, "
        "round 28 points hessian conf/algorithm/gptq.yaml:2",
    ]


def test_plan_shows_options_of_algorithms() -> None:
    assert "gptq(damp=0.01, act_order=True" in text(*plan_tables(plan("recipe=w4a16_gptq")))


def test_plan_ends_with_estimates_and_digests() -> None:
    made = plan("recipe=w4a16_rtn")
    size, digests = text(*plan_tables(made)).strip().splitlines()[-2:]
    assert size.startswith("size 13.6 MB -> 5.5 MB, 4.25 bits per quantized weight; no calibration data; peak memory ")
    assert digests == f"recipe {made.recipe.digest()[:12]}, plan {made.digest()[:12]}"


def test_plan_says_what_is_exported_and_what_the_format_says_differently() -> None:
    wanted = ("export=compressed_tensors", "model.dtype=bfloat16", "export.compressed_tensors.reader=transformers")
    said = text(*plan_tables(plan("recipe=w4a16_rtn", *wanted)))
    assert lines_of(said, "export ", "  note: ") == [
        "export compressed_tensors(reader=transformers)",
        "note: scales are rounded to bfloat16, the model's dtype; scale=bfloat16 in a spec calibrates with such ones",
    ]


def test_plan_says_nothing_of_an_export_that_is_none() -> None:
    assert lines_of(text(*plan_tables(plan("recipe=w4a16_rtn"))), "export") == []


def test_a_wrapper_that_stands_in_for_another_class_is_named() -> None:
    assert "LlamaRMSNorm as RMSNorm" in text(*plan_tables(plan("recipe=int16_activations")))


def test_full_has_a_line_for_every_module() -> None:
    made = plan("recipe=w8a8_static")
    said = text(*plan_tables(made, full=True))
    assert all(lines_of(said, f"{module.name} ") for module in made.modules)
    assert all(lines_of(said, f"{row.name} ") for row in made.untouched)


def test_quality_table_compares_with_float() -> None:
    said = text(quality_table(Measured(STAGES, {"float": 4_000_000, "quantized": 1_500_000})))
    assert [" ".join(line.split()) for line in said.splitlines()] == [
        "perplexity change KL to float top-1 agreement size",
        "float 20.000 4.0 MB",
        "weights quantized 20.500 +2.50 % 0.01234 95.00 %",
        "all quantized 21.000 +5.00 % 0.02000 90.00 % 1.5 MB",
    ]


def test_a_divergence_that_rounds_to_zero_has_no_sign() -> None:
    stages = {"float": STAGES["float"], "weights": {**STAGES["weights"], "kl": -3e-9}}
    said = text(quality_table(Measured(stages)))
    assert " 0.00000 " in said
    assert "-0.00000" not in said


def test_the_end_of_a_run_says_where_everything_lies() -> None:
    seconds = {"load": 0.5, "calibrate": 1.25, "total": 2.0}
    result = RunResult(Path("outputs/demo/now"), STAGES, {}, seconds, {}, run_id="abc")
    console = Console(file=StringIO(), width=200, highlight=False)
    show_result(console, result, 2040)
    said = console.file.getvalue()
    assert "measured on 2,040 tokens; 2.0 s in all: load 0.5 s, calibrate 1.2 s\n" in said
    assert "model and record: outputs/demo/now\n" in said
    assert "MLflow run abc: wrapq ui shows it\n" in said
    assert said.endswith('load it: wrapq.load("outputs/demo/now")\n')


@pytest.mark.parametrize(("size", "said"), [(0, "0.0 MB"), (1_234_567, "1.2 MB"), (72_680_000_000, "72.68 GB")])
def test_megabytes(size: int, said: str) -> None:
    assert megabytes(size) == said


def test_progress_on_a_terminal_has_rate_and_remaining_time() -> None:
    console = Console(file=StringIO(), width=150, force_terminal=True)
    with ConsoleProgress(console).task("Calibrating", 4, "block") as advance:
        for _ in range(4):
            advance()
    said = console.file.getvalue()
    assert "Calibrating" in said
    assert "4/4" in said
    assert "block/s" in said


def test_progress_in_a_file_is_silent_but_for_notes() -> None:
    console = Console(file=StringIO(), width=150)
    progress = ConsoleProgress(console)
    with progress.task("Calibrating", 4, "block") as advance:
        advance()
    progress.note("something [odd] happened")
    assert console.file.getvalue() == "note: something [odd] happened\n"
