"""The export of a converted model: written beside its place, loaded, compared, and only then put in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrapq.engine.checkpoint import GENERATION
from wrapq.engine.folder import RunFolder
from wrapq.engine.measure import forward_logits
from wrapq.errors import ModelError, OutputError
from wrapq.resolve.exporter import Exporter, make_exporter
from wrapq.resolve.plan import Plan
from wrapq.runtime.module import QuantizedModule

EXPORTS = "export"
"""The folder in a run's for its exports, one folder for each format."""
_BATCH, _LENGTH = 2, 48


@dataclass(frozen=True)
class Exported:
    """An export that was loaded and compared.

    Attributes:
        path: its folder.
        error: the difference between its logits and ours, relative to the norm of ours.
        size: bytes of its weights.
        notes: what somebody must know who loads it.
    """

    path: Path
    error: float
    size: int
    notes: tuple[str, ...] = ()


def export_model(model: nn.Module, plan: Plan, run: Path, target: Path | None = None) -> Exported | None:
    """Write the converted `model` of the run in the folder `run` as its plan's recipe says; None when it says nothing.

    Args:
        model: the run's model, on any device; the export is compared on the same.
        plan: the run's plan.
        run: the run's folder, with the tokenizer.
        target: an empty or new folder for the export; `export/FORMAT` in the run's when not given.

    Raises:
        ModelError: the other project does not load the export, or computes something else.
        OutputError: the folder cannot be written.
    """
    exporter = make_exporter(plan.recipe.export)
    if exporter is None:
        return None
    with _whole_folder(target or run / EXPORTS / plan.recipe.export.format, replace=target is None) as (place, partial):
        folder = RunFolder(partial)
        exporter.export(model, plan, folder)
        _add_companions(run, folder)
        error, notes = _compare(exporter, model, plan, partial)
        size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return Exported(place, error, size, (*notes, *exporter.notes(plan)))


def _add_companions(run: Path, folder: RunFolder) -> None:
    """The tokenizer and the generation configuration, from the run's folder."""
    from transformers import AutoTokenizer

    folder.write_files(AutoTokenizer.from_pretrained(run).save_pretrained)
    if (run / GENERATION).is_file():
        folder.write_text(GENERATION, (run / GENERATION).read_text(encoding="utf-8"))


def _compare(exporter: Exporter, model: nn.Module, plan: Plan, folder: Path) -> tuple[float, tuple[str, ...]]:
    """How far the logits of the export are from ours, and the reader's notes.

    Raises:
        ModelError: it is more than rounding.
    """
    ids, device = _token_ids(model), next(model.parameters()).device
    theirs, notes, left_float = exporter.read(folder, ids, str(device))
    with torch.no_grad(), without(model, left_float):
        ours = forward_logits(model, ids.to(device)).float().cpu()
    error = float((theirs - ours).norm() / ours.norm())
    if not error <= (allowed := exporter.tolerance(plan)):
        raise ModelError(
            f"the {plan.recipe.export.format} export loads, but computes something else: its logits are off by "
            f"{error:.2g} of their norm, where rounding explains {allowed:.0e}; a defect of wrapq or of the loader"
        )
    return error, notes


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


def _token_ids(model: nn.Module) -> Tensor:
    """Token ids [B, T] drawn with a fixed seed: no data is needed to compare two models."""
    config = cast(Any, model).config.get_text_config()
    length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    return torch.randint(config.vocab_size, (_BATCH, length), generator=torch.Generator().manual_seed(0))


@contextmanager
def _whole_folder(target: Path, replace: bool) -> Iterator[tuple[Path, Path]]:
    """`target` and a folder beside it that takes its place when the block ends well and else vanishes."""
    partial, before = (target.parent / f".{target.name}.{word}" for word in ("partial", "before"))
    if not replace and target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise OutputError(f"{target} exists already; name a new or an empty folder")
    try:
        with _disk(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield target, partial
        with _disk(target):
            shutil.rmtree(before, ignore_errors=True)
            if target.exists():
                os.replace(target, before)
            os.replace(partial, target)
            shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
