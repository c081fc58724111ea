"""The page of a sweep, from plain records."""

from __future__ import annotations

from pathlib import Path

from wrapq.html.sweep_page import render_sweep


def job(number: int, bits: float, kl: float, **more: object) -> dict[str, object]:
    figures = {"perplexity": 30 + 10 * kl, "perplexity_increase": kl / 3, "kl": kl, "top1_agreement": 1 - kl,
               "bits_per_weight": bits, "size_mb": 2 + bits, "seconds": 3.5 * number}  # fmt: skip
    parameters = {"recipe": "w4a16_gptq", "rules.linear.weight.group_size": str(2**number)}
    return {"name": f"job {number}", "status": "FINISHED", "parameters": parameters, "figures": figures, **more}


RECORDS = [
    job(1, 4.0, 0.05),
    job(2, 4.5, 0.02, winner=True, goals="met"),
    job(3, 5.0, 0.03, goals="missed"),
    job(4, 8.0, 0.001),
    {"name": "job 5", "status": "FAILED", "reason": "ModelError: <b>no weights</b>", "parameters": {"recipe": "x"}},
]


def test_every_job_stands_in_the_page(tmp_path: Path) -> None:
    text = render_sweep(RECORDS, tmp_path / "report.html", "A sweep", "Five jobs.").read_text()
    for words in ("<h1>A sweep</h1>", "Five jobs.", "job 1", "job 4", "w4a16_gptq", "0.00100", "met", "missed"):
        assert words in text
    assert text.count('<tr class="winner">') == 1
    assert text.count('class="dot best"') == 2 * 3  # jobs 1 and 4 in each plot
    assert "ModelError: &lt;b&gt;no weights" in text


def test_a_sweep_of_which_nothing_finished(tmp_path: Path) -> None:
    text = render_sweep(RECORDS[-1:], tmp_path / "report.html").read_text()
    assert "<svg" not in text
    assert "1 jobs, 1 failed." in text
