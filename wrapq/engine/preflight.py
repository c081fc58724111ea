"""What a machine would refuse of a plan, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

from wrapq.calibration.processes import Processes
from wrapq.engine.host import find_device
from wrapq.engine.kernels import check_kernels
from wrapq.engine.streaming_checkpoint import check_streaming
from wrapq.recipe.schema import Settings
from wrapq.resolve.plan import Plan
from wrapq.runs.folder import check_room


def check_machine(plan: Plan, settings: Settings, processes: Processes) -> None:
    """Raise what would end a run of `plan` here later: a device or kernels that are not there, a way of loading that
    does not fit, an outputs folder that cannot be written or has no room for the result.

    Raises:
        ModelError, UnknownNameError, PlanError, OutputError: in this order.
    """
    find_device(settings, processes)
    check_kernels(settings.runtime.kernels)
    check_streaming(plan, settings, processes)
    check_room(Path(settings.paths.outputs).expanduser() / plan.recipe.name, plan.estimate.quantized_bytes)
