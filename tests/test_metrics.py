"""The rows that describe figures, and what is made of them alike everywhere."""

from __future__ import annotations

import math

import pytest

from wrapq.errors import WrapqError
from wrapq.metrics import METRICS, Measured, Metric, duration, measures, metrics, pareto, stage_table

STAGES = {
    "float": {"perplexity": 20.0},
    "weights": {"perplexity": 20.0, "kl": -3e-9, "top1_agreement": 1.0},
    "quantized": {"perplexity": 19.0, "kl": 0.25, "top1_agreement": 0.5},
}


def test_every_figure_is_described() -> None:
    for metric in metrics():
        assert metric.goal.startswith("At least " if metric.higher else "At most "), metric.name
        assert metric.goal.endswith("."), metric.name
        assert metric.meter or metric.read or metric.exported, f"{metric.name} comes from nowhere"
    labels = [metric.label for metric in metrics()]
    assert len(set(labels)) == len(labels)


def test_one_table_of_the_quality_at_each_stage() -> None:
    heads, rows = stage_table(Measured(STAGES, {"float": 4_000_000, "quantized": 2_500_000_000}))
    assert heads == ["", "perplexity", "change", "KL to float", "top-1 agreement", "size"]
    assert rows == [
        ["float", "20.000", "", "", "", "4.0 MB"],
        ["weights quantized", "20.000", "+0.00 %", "0.00000", "100.00 %", ""],
        ["all quantized", "19.000", "-5.00 %", "0.25000", "50.00 %", "2.50 GB"],
    ]


def test_what_was_not_measured_is_no_figure() -> None:
    assert Measured().figures() == {}
    assert Measured(sizes={"float": 8}).figures() == {}
    assert Measured({"elsewhere": {"perplexity": 3.0}}).figures() == {}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("perplexity_increase", 0.02, "at most 2.00 %"),
        ("top1_agreement", 0.95, "at least 95.00 %"),
        ("size_mb", 5.5, "at most 5.5 MB"),
        ("seconds", 200.0, "at most 3 min 20 s"),
    ],
)
def test_a_goal_in_words(name: str, value: float, said: str) -> None:
    assert METRICS.get(name).bound(value) == said


def test_the_names_in_mlflow() -> None:
    assert [metric.mlflow for metric in metrics()] == [
        "quantized/perplexity",
        "perplexity_increase",
        "quantized/kl",
        "quantized/top1_agreement",
        "bits_per_weight",
        "size/quantized_mb",
        "seconds/total",
        "export/token_ms",
        "export/first_token_ms",
        "export/token_speedup",
        "export/first_token_speedup",
        "export/peak_mb",
        "export/size_mb",
        "export/top1_agreement",
        "export/greedy_agreement",
    ]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(WrapqError, match="metric 'kl' is registered twice"):
        measures(Metric("kl", "mine", "At most this."))(object)


def test_a_name_can_be_written_in_a_recipe() -> None:
    with pytest.raises(WrapqError, match="'Mean Cosine': a name is in lower case"):
        Metric("Mean Cosine", "cosine", "At least this.")


@pytest.mark.parametrize(("seconds", "said"), [(4.06, "4.1 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_pareto_front() -> None:
    points = [(1, 5), (2, 3), (2, 4), (4, 1), (5, 1), (math.nan, 0)]
    assert pareto(points) == [True, True, False, True, False, False]
