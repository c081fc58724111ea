"""Measuring and recording the kernels of a finished model on this machine."""

from __future__ import annotations

from torch import nn

from wrapq.engine.context import Run
from wrapq.foreign import plain
from wrapq.runs.folder import KERNELS_FILE
from wrapq.runtime.choose import AUTO, ROWS, choose_kernels
from wrapq.runtime.kernel import KERNELS, REFERENCE


def check_kernels(policy: str) -> None:
    """Raise `UnknownNameError` unless `policy` is auto, reference or the name of a kernel."""
    if policy not in (AUTO, REFERENCE):
        KERNELS.get(policy)


def record_kernels(run: Run, model: nn.Module) -> None:
    """Choose the kernels of a converted model that is saved already, and record them, unless it is the reference's.

    The choice belongs to this machine: nothing of it is saved with the model, whose own outputs are the reference's.
    """
    policy = run.settings.runtime.kernels
    if policy != REFERENCE and (report := choose_kernels(model, policy)).choices:
        run.folder.write_text(KERNELS_FILE, plain(report.table()))
        counts = {f"kernels/{name}": count for name, count in report.counts().items()}
        speeds = {f"kernels/speedup_{rows}": speed for rows in ROWS if (speed := report.speedup(rows)) is not None}
        run.tracker.metrics({**counts, **speeds, "kernels/mb": report.bytes / 1e6})
        run.kernels = report.summary()
