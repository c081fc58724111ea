"""What a run leaves in writing: its folder's status and its tracked run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wrapq.calibration.data import Samples
from wrapq.calibration.sources.base import Source
from wrapq.engine.checkpoint import MANIFEST, weight_files
from wrapq.engine.context import Run
from wrapq.engine.export import EXPORTS, Exported
from wrapq.engine.folder import STATUS_FILE, RunFolder
from wrapq.engine.goals import Verdict, all_met, figures, judge
from wrapq.engine.kernels import KERNELS_FILE
from wrapq.engine.lock import LOCK, device_class, environment
from wrapq.engine.measure import FLOAT, QUANTIZED, Quality
from wrapq.engine.resume import forget_progress
from wrapq.pages.note import run_note
from wrapq.pages.run import REPORT, render_run
from wrapq.recipe.dump import to_yaml
from wrapq.tracking import Tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: where everything lies.
        metrics: for each stage (`float`, `weights`, `quantized`) its metrics.
        sizes: bytes of the float and of the quantized model, and of its export.
        seconds: for each step of the run how long it took.
        digests: of model, data, plan, quantization parameters and outputs.
        notes: what a reader should know.
        run_id: the id of the MLflow run, or None.
        run_url: its page, where a server shows it.
        exported: the copy in another project's format, where the recipe asks for one.
        goals: the verdict on every goal of the recipe.
        figures: what goals bound and sweeps compare, by the names of `Goals`.
        kernels: which kernels run the model on this machine and how fast, in a line; `wrapq.load(..., runtime="auto")`.
    """

    folder: Path
    metrics: dict[str, dict[str, float]]
    sizes: dict[str, int]
    seconds: dict[str, float]
    digests: dict[str, str]
    notes: tuple[str, ...] = ()
    run_id: str | None = None
    run_url: str | None = None
    exported: Exported | None = None
    kernels: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    goals: dict[str, Verdict] = field(default_factory=dict)


def open_record(run: Run) -> None:
    """The run is on record before anything is loaded."""
    plan, recipe = run.plan, run.plan.recipe
    run.folder.write_status("RUNNING", recipe=recipe.name)
    run.folder.write_text("recipe.yaml", to_yaml(recipe))
    run.folder.write_text("plan.json", plan.model_dump_json(indent=1) + "\n")
    run.digests |= {"recipe": recipe.digest(), "plan": plan.digest()}
    versions = {f"version.{name}": version for name, version in environment().items()}
    tags = {"recipe": recipe.name, "description": recipe.description, "folder": str(run.folder.path.resolve())}
    tags |= {**versions, "device": device_class(run.device), **_digest_tags(run), **run.label.tags}
    run.tracker.start(run.label.name or recipe.name, tags, recipe.model_dump(), run.folder.path, wait=False)


def record_data(run: Run, context: str, source: Source, samples: Samples) -> None:
    """Write down which data the run reads."""
    for text in samples.notes:
        run.note(f"{context}: {text}")
    run.digests[context] = samples.digest
    profile = {"tokens": samples.tokens, "windows": len(samples.input_ids), "seq_len": samples.input_ids.shape[1]}
    run.tracker.dataset(source.describe(), samples.digest, source.describe(), context, profile)


def tell_problems(run: Run) -> None:
    """Say what the tracker could not record, once."""
    for problem in run.tracker.problems:
        if (text := f"tracking: {problem}") not in run.notes:
            run.note(text)


def close_record(run: Run, quality: Quality, exported: Exported | None) -> RunResult:
    """Write down how the run ended; its result."""
    sizes = {
        FLOAT: run.plan.estimate.float_bytes,
        QUANTIZED: sum(file.stat().st_size for file in weight_files(run.folder.path)),
    }
    facts: dict[str, Any] = {
        "stages": quality.stages,
        "curves": quality.curves,
        "sizes": sizes,
        "seconds": run.seconds,
        "digests": run.digests,
        "notes": run.notes,
        "kernels": run.kernels,
        "run_id": run.tracker.run_id,
    }
    bits = run.plan.estimate.bits_per_weight
    reached = figures(quality.stages, sizes, run.seconds, bits)
    verdicts = judge(run.plan.recipe.goals, reached)
    if verdicts:
        facts["goals"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    if exported is not None:
        sizes[EXPORTS] = exported.size
        facts["exported"] = {"path": str(exported.path), "error": exported.error}
        run.tracker.metrics({"export/relative_error": exported.error})
    run.folder.write_status("FINISHED", recipe=run.plan.recipe.name, **facts)
    write_report(run.folder)
    run.tracker.tags({**_digest_tags(run), "mlflow.note.content": run_note(run.plan, quality.stages, sizes)})
    run.tracker.metrics({f"size/{stage}_mb": size / 1e6 for stage, size in sizes.items()})
    run.tracker.metrics({f"seconds/{step}": value for step, value in run.seconds.items()})
    if bits is not None:
        run.tracker.metrics({"bits_per_weight": bits})
    record_goals(run.tracker, verdicts)
    for name in _ARTIFACTS:
        if (run.folder.path / name).exists():
            run.tracker.artifact(run.folder.path / name)
    _register(run, quality)
    run.tracker.finish()
    tell_problems(run)
    run_id, url = run.tracker.run_id, run.tracker.run_url
    forget_progress(run.folder)
    return RunResult(
        run.folder.path,
        quality.stages,
        sizes,
        run.seconds,
        run.digests,
        tuple(run.notes),
        run_id,
        url,
        exported,
        run.kernels,
        reached,
        verdicts,
    )


def record_goals(tracker: Tracker, verdicts: Mapping[str, Verdict]) -> None:
    """Tag the tracked run with what became of its goals: `goals` is met or missed, `goal.NAME` says more."""
    if not verdicts:
        return
    words = {True: "met", False: "missed"}
    tags = {f"goal.{name}": f"{words[v.met]}: {v.value} of {v.bound}" for name, v in verdicts.items()}
    tracker.tags({"goals": words[all_met(verdicts)], **tags})
    values = {f"goal/{name}": v.value for name, v in verdicts.items() if v.value is not None}
    tracker.metrics({**values, "goals_missed": sum(not v.met for v in verdicts.values())})


_ARTIFACTS = (
    REPORT,
    "recipe.yaml",
    "plan.json",
    LOCK,
    "manifest.json",
    "modules.json",
    "histograms.json",
    "qparams.safetensors",
    "statistics.safetensors",
    KERNELS_FILE,
    "log.txt",
)


def _register(run: Run, quality: Quality) -> None:
    """Upload the model and enter it in the model registry, where the settings say so."""
    if (entry := run.settings.tracking.register_as) is None:
        return
    for file in sorted(run.folder.path.iterdir()):
        if file.is_file() and file.suffix in _MODEL_FILES and file.name not in _RECORDS:
            run.tracker.artifact(file, "model")
    figures = {f"{stage}.perplexity": f"{metrics['perplexity']:.4f}" for stage, metrics in quality.stages.items()}
    tags = {"recipe": run.plan.recipe.name, **figures, **_digest_tags(run)}
    run.tracker.register(entry.name, entry.alias, run.plan.recipe.description, tags)


def write_report(folder: RunFolder) -> None:
    """The page that shows the run."""
    folder.write_text(REPORT, render_run(folder.path))


_MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja"}
_RECORDS = {*_ARTIFACTS, STATUS_FILE} - {MANIFEST}


def record_failure(folder: RunFolder, tracker: Tracker, error: BaseException) -> None:
    """Write down why the run ended."""
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    _log.error("failed: %s", reason)
    try:
        folder.write_status("FAILED", reason=reason)
        if (folder.path / "plan.json").is_file():
            write_report(folder)
            tracker.artifact(folder.path / REPORT)
    except Exception as second:  # a full disk may be the very reason; the first error is the one to show
        _log.error("the folder cannot say so: %s", second)
    tracker.finish("FAILED", reason)


def _digest_tags(run: Run) -> Mapping[str, str]:
    return {f"digest.{name}": digest for name, digest in run.digests.items()}
