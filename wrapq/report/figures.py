"""The figures of a run, and its goals, as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.text import Text

from wrapq.engine.goals import AT_LEAST, SECONDS, SHARES, Verdict

COLUMNS = {
    "perplexity": "perplexity",
    "perplexity_increase": "change",
    "kl": "KL to float",
    "top1_agreement": "top-1 agreement",
    "bits_per_weight": "bits/weight",
    "size_mb": "size",
    SECONDS: "time",
}
_FORMATS = {
    "perplexity": "{:.3f}",
    "kl": "{:z.5f}",
    "bits_per_weight": "{:.2f}",
    "size_mb": "{:.1f} MB",
    SECONDS: "{:.1f} s",
}


def show(name: str, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return ""
    if name in SHARES:
        return f"{100 * value:+.2f} %" if name not in AT_LEAST else f"{100 * value:.2f} %"
    return _FORMATS[name].format(value)


def goal_lines(verdicts: Mapping[str, Verdict]) -> Iterator[Text]:
    """A line for each goal of one run."""
    for name, verdict in verdicts.items():
        met = Text("met", "green") if verdict.met else Text("missed", "bold red")
        reached = show(name, verdict.value) or "none, since no weight is quantized"
        yield Text.assemble(f"goal {name}: {bound_text(name, verdict.bound)}, reached {reached}: ", met)


def bound_text(name: str, bound: float) -> str:
    """What a goal asks for, in words."""
    return f"at {'least' if name in AT_LEAST else 'most'} {show(name, bound).lstrip('+')}"
