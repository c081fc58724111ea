"""What is done with a run that finished before: it is found, read and exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from wrapq.engine.checkpoint import MANIFEST, load
from wrapq.engine.export import Exported, export_model
from wrapq.engine.folder import STATUS_FILE
from wrapq.engine.lock import LOCK
from wrapq.engine.progress import Progress
from wrapq.engine.run import use_machine
from wrapq.errors import ModelError, PlanError, Problem, nearest
from wrapq.recipe.schema import Export, Recipe, Settings
from wrapq.resolve.exporter import NONE
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import check_export, check_names
from wrapq.resolve.rules import Sources

PLAN = "plan.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MAX_PATH = 1024


def export_run(
    run: str, export: Export, settings: Settings, progress: Progress, target: Path | None = None
) -> Exported:
    """Export a finished run; what `wrapq export` does.

    Args:
        run: the folder of a run, or of a recipe's runs, of which the newest is taken, or the name of a recipe.
        export: the format and its options.
        settings: device and threads, and the folder in which a recipe's name is looked up.
        progress: told of each step.
        target: see `export_model`.

    Raises:
        RecipeError, PlanError: no such format or option, or the format cannot say what the run quantized.
        ModelError, OutputError: see `export_model`; there is no such run.
    """
    if export.format == NONE:
        raise PlanError([Problem("export", "no format is chosen", (), "say which: export=compressed_tensors")])
    folder = find_run(run, Path(settings.paths.outputs))
    plan = _plan_to_export(folder, export)
    check_export(plan)
    device = use_machine(settings, plan.recipe.seed)
    with progress.task("Loading the model"):
        model = load(folder, device)
    with progress.task("Exporting and loading the export"):
        exported = cast(Exported, export_model(model, plan, folder, target))
    for text in exported.notes:
        progress.note(text)
    return exported


def find_run(text: str, outputs: Path) -> Path:
    """The folder of the run that `text` means: a folder, a recipe's name, or the id of an MLflow run.

    Raises:
        ModelError: it means none.
    """
    if "\0" in text or len(text) > _MAX_PATH:
        raise ModelError(f"{text[:60]!r} is neither the folder of a finished run nor a recipe that was run")
    if _RUN_ID.fullmatch(text) and (tracked := _find_tracked(text, outputs.expanduser())):
        return tracked
    for candidate in (Path(text).expanduser(), outputs.expanduser() / text):
        runs = [candidate, *sorted(candidate.glob("*/"), reverse=True)] if candidate.is_dir() else []
        if found := next((run for run in runs if (run / MANIFEST).is_file()), None):
            return found
    known = sorted({path.parent.parent.name for path in outputs.expanduser().glob(f"*/*/{MANIFEST}")})
    hint = f"; did you mean: {', '.join(nearest(text, known))}" if known else f"; {outputs} holds no finished run"
    raise ModelError(f"{text} is neither the folder of a finished run nor a recipe that was run{hint}")


def find_lock(text: str, outputs: Path) -> Path:
    """The lock that `text` means: a YAML file, or that of the run that `find_run` finds; raises `ModelError`."""
    return Path(text).expanduser() if text.endswith(".yaml") else find_run(text, outputs) / LOCK


def read_plan(path: Path) -> Plan:
    """The plan in the file `path`, a run's `plan.json` or what `wrapq plan --json` printed; raises `ModelError`."""
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a plan: {str(error).splitlines()[0]}") from error


def read_status(folder: Path) -> dict[str, Any]:
    """What the run in `folder` says of how it ended; raises `ModelError` when it says nothing."""
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / STATUS_FILE} cannot be read: {error}") from error
    if not isinstance(status, dict):
        raise ModelError(f"{folder / STATUS_FILE} does not hold what a run writes")
    return status


def _find_tracked(run_id: str, outputs: Path) -> Path | None:
    for manifest in outputs.glob(f"*/*/{MANIFEST}"):
        if (status := manifest.parent / STATUS_FILE).is_file() and read_status(status.parent).get("run_id") == run_id:
            return manifest.parent
    return None


def _plan_to_export(folder: Path, export: Export) -> Plan:
    plan = read_plan(folder / PLAN)
    recipe: Recipe = plan.recipe.model_copy(update={"export": export})
    check_names(recipe, Sources({}))
    return plan.model_copy(update={"recipe": recipe})
