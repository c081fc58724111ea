"""What is done with a run that finished before: it is found and exported."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pydantic import ValidationError

from wrapq.engine.checkpoint import MANIFEST, load
from wrapq.engine.export import Exported, export_model
from wrapq.engine.progress import Progress
from wrapq.engine.run import use_machine
from wrapq.errors import ModelError, PlanError, Problem, nearest
from wrapq.recipe.schema import Export, Recipe, Settings
from wrapq.resolve.exporter import NONE
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import check_export, check_names
from wrapq.resolve.rules import Sources

PLAN = "plan.json"


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
    plan = _read_plan(folder, export)
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
    """The folder of the run that `text` means; raises `ModelError` when it means none."""
    for candidate in (Path(text).expanduser(), outputs.expanduser() / text):
        runs = [candidate, *sorted(candidate.glob("*/"), reverse=True)] if candidate.is_dir() else []
        if found := next((run for run in runs if (run / MANIFEST).is_file()), None):
            return found
    known = sorted({path.parent.parent.name for path in outputs.expanduser().glob(f"*/*/{MANIFEST}")})
    hint = f"; did you mean: {', '.join(nearest(text, known))}" if known else f"; {outputs} holds no finished run"
    raise ModelError(f"{text} is neither the folder of a finished run nor a recipe that was run{hint}")


def _read_plan(folder: Path, export: Export) -> Plan:
    try:
        plan = Plan.model_validate_json((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ModelError(f"{folder / PLAN} cannot be read: {str(error).splitlines()[0]}") from error
    recipe: Recipe = plan.recipe.model_copy(update={"export": export})
    check_names(recipe, Sources({}))
    return plan.model_copy(update={"recipe": recipe})
