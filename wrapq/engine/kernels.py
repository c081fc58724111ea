"""Which kernels a finished model runs on, measured on the machine at hand and written down."""

from __future__ import annotations

from torch import nn

from wrapq.engine.folder import RunFolder
from wrapq.runtime.choose import AUTO, ROWS, KernelReport, choose_kernels
from wrapq.runtime.kernel import KERNELS, REFERENCE
from wrapq.tracking import Tracker

KERNELS_FILE = "kernels.txt"


def check_kernels(policy: str) -> None:
    """Raise `UnknownNameError` unless `policy` is auto, reference or the name of a kernel."""
    if policy not in (AUTO, REFERENCE):
        KERNELS.get(policy)


def record_kernels(model: nn.Module, policy: str, folder: RunFolder, tracker: Tracker) -> str:
    """Choose the kernels of a converted model that is saved already, and leave the table in its folder and its record.

    The choice belongs to this machine: nothing of it is saved with the model, whose own outputs are the reference's.

    Returns:
        The summary in one line; empty for `reference`, with which nothing is measured.
    """
    if policy == REFERENCE:
        return ""
    report = choose_kernels(model, policy)
    if not report.choices:
        return ""
    folder.write_text(KERNELS_FILE, report.table())
    tracker.metrics(_metrics(report))
    return report.summary()


def _metrics(report: KernelReport) -> dict[str, float]:
    metrics: dict[str, float] = {f"kernels/{name}": count for name, count in report.counts().items()}
    for rows in ROWS:
        if (speed := report.speedup(rows)) is not None:
            metrics[f"kernels/speedup_{rows}"] = speed
    return metrics | {"kernels/mb": report.bytes / 1e6}
