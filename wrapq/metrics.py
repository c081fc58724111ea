"""The figures of a run, a row each: name, label, unit, format, which way is better, how a run has it.

Goals, tables, pages, MLflow, comparisons, sweeps and `verify` loop over these rows; none of them knows a figure of its
own. A new one is a row here, or one file of another package under the entry point `wrapq.plugins`:

    @measures(Metric("cosine", "cosine", "At least this mean cosine of the logits.", higher=True))
    class Cosine:
        def __init__(self):
            self.sum = self.count = 0

        def update(self, reference, logits, ids, mask):  # of the float model and of the one measured [B, T, V]
            cosines = torch.cosine_similarity(reference, logits, dim=-1)  # [B, T]
            real = torch.ones_like(cosines) if mask is None else mask
            self.sum, self.count = self.sum + (cosines * real).sum(), self.count + real.sum()

        def result(self):
            return {"cosine": float(self.sum / self.count)}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, TypeVar

from wrapq.errors import WrapqError
from wrapq.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

FLOAT, WEIGHTS, QUANTIZED = "float", "weights", "quantized"
STAGES = {FLOAT: "float", WEIGHTS: "weights quantized", QUANTIZED: "all quantized"}
"""The states of a model in which its quality is measured, and how tables call them."""
KL, SIZE, SECONDS = "kl", "size_mb", "seconds"
SQNR_CEILING = 200.0
"""In dB; stands for "equal" in a curve: float32 rounding alone is near 150."""


class Meter(Protocol):
    """What adds up metrics over the batches of evaluation data."""

    def update(self, reference: Tensor | None, logits: Tensor, ids: Tensor, mask: Tensor | None) -> None:
        """Add one batch.

        Args:
            reference: logits of the float model [B, T, V]; None only where one of the meter's metrics does without.
            logits: logits of the model that is measured [B, T, V].
            ids: token ids [B, T].
            mask: bool [B, T], True at the positions whose prediction of the next token counts: neither of the two is
                padding, and that token is scored. None where all but the last do.
        """

    def result(self) -> Mapping[str, float]:
        """The metrics by name; further figures may stand beside them, and are kept with the stage."""


@dataclass(frozen=True)
class Band:
    """How far a metric may lie from the locked one: the larger of a share of it and an absolute amount."""

    relative: float = 0.0
    absolute: float = 0.0

    def holds(self, expected: float, found: float) -> bool:
        """Whether `found` is near enough."""
        return abs(found - expected) <= max(self.relative * abs(expected), self.absolute)

    def __str__(self) -> str:
        parts = [f"{self.relative:.0%}" if self.relative else "", f"{self.absolute:g}" if self.absolute else ""]
        return " or ".join(filter(None, parts))


@dataclass(frozen=True)
class Measured:
    """What a run measured, from which its figures are read.

    Attributes:
        stages: for each stage what its meters gave; the first is what the others are compared with.
        sizes: bytes by stage.
        seconds: by step of the run, and in `total`.
        bits_per_weight: of the quantized weights; None where there are none.
        exports: what the copies for other runtimes do there, for each by the names of figures without their `export_`.
    """

    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    bits_per_weight: float | None = None
    exports: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Of the quantized model the figures that there are, by name."""
        values = ((metric.name, metric.value(self)) for metric in metrics(self.exports))
        return {name: value for name, value in values if value is not None}


METRICS: Registry[Metric] = Registry("metric", "")
"""All metrics by name: the engine's, which are in this file, and those of plug-ins."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in `goals`, `sweep.minimize`, tables for programs.
        label: in the head of a column.
        goal: what a goal on it asks for, in a sentence that begins with At most or At least.
        show: a value with its unit as people read it.
        higher: more is better, and a goal is a lower bound; else less, and an upper one.
        meter: makes what measures it on the logits; the same for all metrics that it measures.
        against_float: the meter needs the float model's logits, so that there is no value of that model itself.
        read: takes it out of what a run measured at a stage, where no meter's result under `name` is it.
        exported: what the figures of an export call it; of several exports the worst counts, as goals hold for each.
        format: of which export it is alone; see `alone`.
        cost: it is paid for quality, and does not depend on the text.
        by_stage: each stage of a run has one.
        title: on the axis of a plot; the label when empty.
        unit: after the title.
        note: what it is, beside its value.
        tracked: what the value of the quantized model is called in MLflow.
        band: how far `verify` lets it lie off on another kind of machine; None where that says nothing.
    """

    name: str
    label: str
    goal: str
    show: Callable[[float], str] = "{:.4f}".format
    higher: bool = False
    meter: Callable[[], Meter] | None = None
    against_float: bool = True
    read: Callable[[Measured, str], float | None] | None = None
    exported: str = ""
    format: str = ""
    cost: bool = False
    by_stage: bool = True
    title: str = ""
    unit: str = ""
    note: str = ""
    tracked: str = ""
    band: Band | None = None

    def __post_init__(self) -> None:
        if (name := self.name.removesuffix(f".{self.format}")) != METRICS.normalize(name):
            raise WrapqError(f"metric {self.name!r}: a name is in lower case, with _ between words")

    def value(self, measured: Measured, stage: str = QUANTIZED) -> float | None:
        """The figure at a stage; None where there is none."""
        if self.exported:
            exports = measured.exports if not self.format else {self.format: measured.exports.get(self.format, {})}
            found = [figures[self.exported] for figures in exports.values() if self.exported in figures]
            return (min if self.higher else max)(found) if found else None
        if self.read is not None:
            return self.read(measured, stage)
        return measured.stages.get(stage, {}).get(self.name)

    def reachable(self, exports: Collection[str]) -> bool:
        """Whether a run that makes these `exports` can have the figure."""
        return not self.exported or (self.format in exports if self.format else bool(exports))

    def alone(self, format: str) -> Metric:
        """The same figure of the export in one `format`."""
        return replace(
            self,
            name=f"{self.name}.{format}",
            format=format,
            label=f"{self.label}, {format}",
            title=f"{self.title or self.label}, {format}",
            tracked=f"export/{format}/{self.exported}",
        )

    def text(self, value: float | None) -> str:
        """A value as people read it; nothing for None."""
        return "" if value is None else self.show(value)

    def bound(self, value: float) -> str:
        """What a goal of `value` asks for."""
        return f"at {'least' if self.higher else 'most'} {self.show(value).lstrip('+')}"

    def best(self, values: Sequence[float]) -> float:
        """The best of some values."""
        return max(values) if self.higher else min(values)

    @property
    def axis(self) -> str:
        """What stands at the axis of a plot."""
        return f"{self.title or self.label} [{self.unit}]" if self.unit else self.title or self.label

    @property
    def mlflow(self) -> str:
        """What the figure of a run is called in MLflow."""
        return self.tracked or (f"{QUANTIZED}/{self.name}" if self.meter else self.name)


def percent(value: float, sign: bool = False) -> str:
    """A share as per cent."""
    return f"{100 * value:{'+' if sign else ''}.2f} %"


def megabytes(size: float) -> str:
    """Bytes as `12.3 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as `4.1 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _quality_meter() -> Meter:
    return resolve_name("wrapq.evaluation.quality:QualityMeter")()  # which imports torch


def _increase(measured: Measured, stage: str) -> float | None:
    first, now = next(iter(measured.stages), stage), measured.stages.get(stage, {})
    return None if stage == first or not now else now["perplexity"] / measured.stages[first]["perplexity"] - 1


def milliseconds(value: float) -> str:
    """Milliseconds as `12.3 ms`."""
    return f"{value:.3g} ms" if value < 1000 else duration(value / 1000)


def _megabytes(measured: Measured, stage: str) -> float | None:
    return measured.sizes[stage] / 1e6 if stage in measured.sizes else None


_OWN = {
    metric.name: metric
    for metric in (
        Metric(
            "perplexity", "perplexity", "At most this perplexity.", "{:.3f}".format,
            meter=_quality_meter, against_float=False, band=Band(0.01),
        ),
        Metric(
            "perplexity_increase", "change", "At most this much more perplexity than the float model, such as 2%.",
            lambda share: percent(share, sign=True), read=_increase,
            title="increase of perplexity", note="of perplexity over the float model's",
        ),
        Metric(
            KL, "KL to float", "At most this mean divergence from the float model's predictions, in nats per token.",
            "{:z.5f}".format, meter=_quality_meter, band=Band(0.2, 1e-4),
            title="KL divergence to float", unit="nats/token", note="nats per token",
        ),
        Metric(
            "top1_agreement", "top-1 agreement",
            "At least this share of tokens for which the float model predicts the same, such as 95%.",
            percent, higher=True, meter=_quality_meter, band=Band(absolute=0.01),
            note="same next token as the float model",
        ),
        Metric(
            "bits_per_weight", "bits/weight",
            "At most this many bits per quantized weight, scales and zero points included.", "{:.2f}".format,
            read=lambda measured, _: measured.bits_per_weight, cost=True, by_stage=False,
            title="bits per weight", note="of the quantized weights, scales included",
        ),
        Metric(
            SIZE, "size", "At most this large a file of weights, in MB of a million bytes.",
            lambda size: megabytes(size * 1e6), read=_megabytes, cost=True,
            title="size of the weights", unit="MB", tracked="size/quantized_mb",
        ),
        Metric(
            SECONDS, "time", "At most this long a run.", duration,
            read=lambda measured, _: measured.seconds.get("total"), cost=True, by_stage=False,
            title="time of the run", unit="s", note="from data to checked files", tracked="seconds/total",
        ),
        Metric(
            "export_token_ms", "export, each token",
            "At most this many milliseconds for each token that the export goes on with in its runtime.", milliseconds,
            exported="token_ms", cost=True, by_stage=False, title="time for each token in the export's runtime",
            unit="ms", note="in the export's runtime, after the first", tracked="export/token_ms",
        ),
        Metric(
            "export_first_token_ms", "export, first token",
            "At most this many milliseconds to the first token after a prompt in the export's runtime.", milliseconds,
            exported="first_token_ms", cost=True, by_stage=False,
            title="time to the first token in the export's runtime", unit="ms",
            note="in the export's runtime, after a prompt", tracked="export/first_token_ms",
        ),
        Metric(
            "export_token_speedup", "export, speed-up", "At least this many times as fast for each token that the "
            "export goes on with as the float model is in the same runtime.",
            "{:.2f} x".format, higher=True, exported="token_speedup", by_stage=False,
            note="for each token, against the float model there", tracked="export/token_speedup",
        ),
        Metric(
            "export_first_token_speedup", "export, first speed-up", "At least this many times as fast to the first "
            "token after a prompt as the float model is in the same runtime.",
            "{:.2f} x".format, higher=True, exported="first_token_speedup", by_stage=False,
            note="to the first token, against the float model there", tracked="export/first_token_speedup",
        ),
        Metric(
            "export_peak_mb", "export, memory", "At most this much memory in the export's runtime, in MB.",
            lambda size: megabytes(size * 1e6), exported="peak_mb", cost=True, by_stage=False,
            title="memory in the export's runtime", unit="MB", note="at its peak, of the whole process",
            tracked="export/peak_mb",
        ),
        Metric(
            "export_size_mb", "export, size", "At most this large an export, in MB of a million bytes.",
            lambda size: megabytes(size * 1e6), exported="size_mb", cost=True, by_stage=False,
            title="size of the export", unit="MB", tracked="export/size_mb",
        ),
        Metric(
            "export_top1_agreement", "export, top-1",
            "At least this share of tokens for which the export predicts the same as the model it was made of.",
            percent, higher=True, exported="top1_agreement", by_stage=False,
            note="same next token as the model it was made of", tracked="export/top1_agreement",
        ),
        Metric(
            "export_greedy_agreement", "export, greedy",
            "At least this share of 32 likeliest tokens that the export goes on with as the model it was made of.",
            percent, higher=True, exported="greedy_agreement", by_stage=False,
            note="same 32 tokens as the model it was made of", tracked="export/greedy_agreement",
        ),
    )
}  # fmt: skip

for _name, _metric in _OWN.items():
    METRICS.register(_name)(_metric)

M = TypeVar("M", bound=Callable[[], Meter])


def measures(*rows: Metric) -> Callable[[M], M]:
    """Register the metrics that the decorated `Meter` measures."""

    def add(meter: M) -> M:
        for row in rows:
            METRICS.register(row.name)(replace(row, meter=meter))
        return meter

    return add


def metrics(formats: Iterable[str] = ()) -> tuple[Metric, ...]:
    """All metrics: the engine's in the order of this file, then those of plug-ins by name, then those of each export
    alone that has one of the `formats`."""
    rows = (*_OWN.values(), *(METRICS.get(name) for name in METRICS if name not in _OWN))
    return (*rows, *(row.alone(format) for format in formats for row in rows if row.exported))


def metric(name: str) -> Metric:
    """The row of a figure, that of one export alone for `FIGURE.FORMAT`; raises `WrapqError` where there is none."""
    figure, _, format = name.partition(".")
    row = METRICS.get(figure)
    if format and not row.exported:
        raise WrapqError(f"{name}: {figure} is not measured of exports, so that no format has its own")
    return row.alone(format) if format else row


def metrics_of(found: Collection[Mapping[str, float]], decides: Collection[str] = ()) -> tuple[Metric, ...]:
    """The rows of the figures that any of `found` has. Those of each export alone are among them where there are
    several, or where they are among the names of what `decides`."""
    names = {name for figures in found for name in figures}
    formats = dict.fromkeys(name.partition(".")[2] for name in sorted(names) if "." in name)
    rows = (row for row in metrics(formats) if row.name in names)
    return tuple(row for row in rows if not row.format or len(formats) > 1 or row.name in decides)


def own_names() -> tuple[str, ...]:
    """The names of the engine's own metrics, for which no plug-in has to be imported."""
    return tuple(_OWN)


def stage_table(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """The figures at each stage as text: the heads of the columns, the first being empty, and the rows."""
    columns = [metric for metric in metrics() if metric.by_stage]
    rows = [
        [STAGES.get(stage, stage), *(metric.text(metric.value(measured, stage)) for metric in columns)]
        for stage in measured.stages
    ]
    return ["", *(metric.label for metric in columns)], rows


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both coordinates and better in one; less is better."""
    return [
        math.isfinite(x)
        and math.isfinite(y)
        and not any(ox <= x and oy <= y and (ox < x or oy < y) for ox, oy in points)
        for x, y in points
    ]
