"""What a run with one export says of it."""

from __future__ import annotations

from wrapq.engine.export import Exported
from wrapq.engine.record import RunResult


def export_of(run: RunResult | None) -> Exported:
    assert run is not None
    (exported,) = run.exports.values()
    return exported
