"""Exporting a converted model: written to a temporary folder, loaded and compared before it is moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrapq.engine.beside_float import FloatBeside, with_float
from wrapq.engine.export_comparison import compared, last_digits_changed
from wrapq.engine.host import use_machine
from wrapq.engine.measure import forward_logits
from wrapq.engine.progress import Progress
from wrapq.errors import OutputError, PlanError, Problem
from wrapq.export.base import EXPORTERS, make_exporter
from wrapq.export.reload import greedy
from wrapq.export.stopwatch import TOKENS
from wrapq.ownership import own
from wrapq.recipe.schema import Export, Goals, Settings
from wrapq.resolve.model_source import GENERATION, PROCESSOR_FILES, reading_model
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import check_export, check_names
from wrapq.resolve.rules import Sources
from wrapq.runs.checkpoint import blaming_files, load, weight_bytes
from wrapq.runs.folder import RunFolder, check_room
from wrapq.runs.run_record import find_run
from wrapq.runtime.module import QuantizedModule

EXPORTS = "export"
"""The subfolder of a run's folder with its exports, one folder per format."""
_BATCH, _LENGTH = 2, 48


@dataclass(frozen=True)
class Exported:
    """An export that was loaded and compared.

    Attributes:
        path: its folder.
        error: the difference between its logits and ours, relative to the norm of ours.
        size: bytes of its weights.
        notes: what somebody must know who loads it.
        threads: with which it was measured.
        figures: what was measured of it in its runtime, by the names of `wrapq.metrics` without their `export_`; those
            of the float model there begin with `float_`.
    """

    path: Path
    error: float
    size: int
    notes: tuple[str, ...] = ()
    threads: int = 1
    figures: Mapping[str, float] = field(default_factory=dict)


def export_model(
    model: nn.Module,
    name: str,
    plan: Plan,
    run: Path,
    beside: FloatBeside,
    target: Path | None = None,
    ids: Tensor | None = None,
) -> Exported:
    """Export the converted `model`, load the export, compare it and measure it.

    Args:
        model: the run's model, on any device; the export is compared on the same.
        name: the format, one of those of the plan's recipe.
        plan: the run's plan.
        run: the run's folder, which has the tokenizer.
        beside: measures the float model in the same runtime.
        target: an empty or new folder for the export; `export/FORMAT` in the run's when not given.
        ids: the token ids [B, T] on which it is compared; any when not given.

    Raises:
        ModelError: the other project does not load the export, or computes something else.
        OutputError: the folder cannot be written.
    """
    from transformers import AutoTokenizer

    exporter, place = make_exporter(name, plan.recipe.export[name]), target or run / EXPORTS / name
    with whole_folder(place) as partial:
        folder = RunFolder(partial)
        with reading_model(f"{run}: cannot read the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=False)
        folder.write_files(tokenizer.save_pretrained)
        exporter.export(model, plan, folder)
        for file in (GENERATION, *PROCESSOR_FILES):
            if (run / file).is_file():
                folder.write_text(file, (run / file).read_text(encoding="utf-8"))
        ids, device = _token_ids(model, ids), next(model.parameters()).device
        with _disk(Path(tempfile.gettempdir()), "; TMPDIR names another folder for temporary files"):
            reading = exporter.read(partial, ids, str(device))
        theirs = reading.logits
        with torch.no_grad(), without(model, reading.left_float):
            forward = lambda: [forward_logits(model, ids.to(device)).float().cpu()]  # noqa: E731
            (ours,), own = forward(), None
            if reading.tokens is not None and hasattr(model, "generate"):
                own = greedy(model, ids[:1].cpu().numpy(), reading.tokens.shape[1])
            error, remark = compared(
                name, [theirs], [ours], exporter.tolerance(plan), last_digits_changed(model)(forward)
            )
        size = exporter.size(partial)
    figures = {"top1_agreement": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()), "size_mb": size / 1e6}
    if reading.tokens is not None and own is not None:
        figures["greedy_agreement"] = float((reading.tokens.numpy() == own).mean())
    figures |= reading.measured
    notes = [*reading.notes, *[remark] * bool(remark), *exporter.notes(plan)]
    if plan.recipe.export[name].beside_float:
        floats, failed = beside.figures(name, exporter, plan, ids, device, place)
        figures, notes = with_float(figures, floats), notes + [failed] * bool(failed)
    return Exported(place, error, size, tuple(notes), torch.get_num_threads(), figures)


def export_run(
    run: str, exports: Mapping[str, Export], settings: Settings, progress: Progress, target: Path | None = None
) -> dict[str, Exported]:
    """Export a finished run; what `wrapq export` does.

    Args:
        run: the folder of a run, or of a recipe's runs, of which the newest is taken, or the name of a recipe.
        exports: the formats and their options.
        settings: device and threads, and the folder in which a recipe's name is looked up.
        progress: told of each step.
        target: see `export_model`; with several formats each has a folder in it.

    Raises:
        RecipeError, PlanError: no such format or option, or the format cannot say what the run quantized.
        ModelError, OutputError: see `export_model`; there is no such run.
    """
    if not exports:
        words = ", ".join(f"export={name}" for name in EXPORTERS)
        raise PlanError([Problem("", "export", "no format is chosen", (), f"say which: {words}")])
    record = find_run(run, Path(settings.paths.outputs))
    recipe = record.plan.recipe.model_copy(update={"export": dict(exports), "goals": Goals()})
    check_names(recipe, Sources({}))
    plan = record.plan.model_copy(update={"recipe": recipe})
    check_export(plan)
    targets = {name: target / name if target and len(exports) > 1 else target for name in exports}
    for name, given in targets.items():
        check_target(given or record.folder / EXPORTS / name, given is None, weight_bytes(record.folder))
    beside, found = FloatBeside(settings, record.digests.get("model", "")), {}
    with use_machine(settings, recipe.seed) as device, blaming_files(record.folder):
        with progress.task("Loading the model"):
            model = load(record.folder, device, trust_remote_code=settings.runtime.trust_remote_code)
        for name, given in targets.items():
            with progress.task(f"Exporting to {name} and loading that"):
                found[name] = export_model(model, name, plan, record.folder, beside, given)
            for text in found[name].notes:
                progress.note(f"{name}: {text}")
    return found


def check_target(target: Path, replace: bool, needed_bytes: int) -> None:
    """Raise `OutputError` where `whole_folder` could put nothing, before a model is loaded for it."""
    check_room(target.parent, needed_bytes, "the export", "name another folder")
    with _disk(target):
        if not replace and target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
            raise OutputError(f"{target} exists already; name a new or an empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()


@contextmanager
def without(model: nn.Module, points: Collection[str]) -> Iterator[None]:
    """`model` with `points` of all its modules left float inside the block."""
    changed = {m: m.specs for m in model.modules() if points and isinstance(m, QuantizedModule)}
    try:
        for module, specs in changed.items():
            module.specs = {point: spec for point, spec in specs.items() if point not in points}
        yield
    finally:
        for module, specs in changed.items():
            module.specs = specs


def _token_ids(model: nn.Module, given: Tensor | None) -> Tensor:
    """Token ids [B, T], the first of those that are given, that leave room for what a model goes on with; else drawn
    with a fixed seed, as no data is needed to compare two models."""
    config = cast(Any, model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or _LENGTH + TOKENS
    length = max(1, min(_LENGTH, most - TOKENS))
    if given is not None:
        return given[:_BATCH, :length].contiguous()
    return torch.randint(config.vocab_size, (_BATCH, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well and else vanishes."""
    partial, before, owner = (target.parent / f".{target.name}.{word}" for word in ("partial", "before", "owner"))
    with _disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with own(owner / "lock", f"the export {target}"):
        try:
            with _disk(target):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            yield partial
            with _disk(target):
                shutil.rmtree(before, ignore_errors=True)
                if target.exists():
                    os.replace(target, before)
                os.replace(partial, target)
                shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(owner, ignore_errors=True)


@contextmanager
def _disk(target: Path, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}{remedy}") from error
