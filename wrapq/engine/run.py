"""A run: the execution of one plan, from data to a checked checkpoint, with its record."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.algorithm import ALGORITHMS, RangeSetter, Rounder
from wrapq.calibration.data import Samples, build_samples
from wrapq.calibration.sources.base import Source, make_source
from wrapq.calibration.walker import Batch, Walker
from wrapq.engine.checkpoint import MANIFEST, WEIGHTS, load, qparams_tensors, save_model, tensors_digest
from wrapq.engine.export import EXPORTS, Exported, export_model
from wrapq.engine.folder import RunFolder
from wrapq.engine.kernels import KERNELS_FILE, check_kernels, record_kernels
from wrapq.engine.lock import code_digest, device_class, environment, lock_text
from wrapq.engine.measure import FLOAT, QUANTIZED, Quality, forward_logits, measure_stages
from wrapq.engine.progress import Progress
from wrapq.engine.resume import Keeper, find_unfinished
from wrapq.errors import ModelError
from wrapq.recipe.compose import compose
from wrapq.recipe.dump import to_yaml
from wrapq.recipe.schema import Settings
from wrapq.resolve.exporter import NONE
from wrapq.resolve.model import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.tracking import Tracker, make_tracker
from wrapq.wrappers.model import convert_model, wrap_model

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


@dataclass
class _Run:
    """One run on its way: what its steps share."""

    plan: Plan
    settings: Settings
    folder: RunFolder
    tracker: Tracker
    progress: Progress
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kernels: str = ""

    @contextmanager
    def step(self, name: str, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        """A step of the run, timed and shown."""
        _log.info("%s", title)
        start = time.perf_counter()
        with self.progress.task(title, total, unit) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - start

    def note(self, text: str) -> None:
        """Say something that a reader of the run should know."""
        _log.warning("%s", text)
        self.notes.append(text)
        self.progress.note(text)


def run(
    recipe: str = "demo", overrides: Sequence[str] = (), progress: Progress | None = None, resume: bool = False
) -> RunResult:
    """Run a recipe by name or file, with Hydra overrides; what `wrapq run` does.

    Raises:
        RecipeError, PlanError: before anything is loaded or written.
        WrapqError: see `execute`.
    """
    composed = compose([f"recipe={recipe}", *overrides])
    plan = resolve(composed.recipe, composed.sources, composed.settings.runtime.trust_remote_code)
    return execute(plan, composed.settings, progress or Progress(), resume)


def execute(
    plan: Plan, settings: Settings, progress: Progress, resume: bool = False, tracker: Tracker | None = None
) -> RunResult:
    """Execute a plan and leave its folder and its tracked run.

    With `resume` the newest run of the recipe that did not finish is taken up after its last finished block.

    Whatever happens, the folder says how the run ended and the tracked run is closed; files are whole or absent.

    Raises:
        OutputError: the outputs folder cannot be written, or its disk is full.
        CalibrationError, ModelError, LifecycleError: from the data, the model, a point that no data reached.
    """
    check_kernels(settings.runtime.kernels)
    outputs, name, size = Path(settings.paths.outputs), plan.recipe.name, plan.estimate.quantized_bytes
    folder = find_unfinished(outputs, name) if resume else RunFolder.create(outputs, name, size)
    tracker = tracker or make_tracker(settings)
    with folder.log():
        try:
            device = use_machine(settings, plan.recipe.seed)
            run = _Run(plan, settings, folder, tracker, progress, device)
            result = _execute(run)
        except BaseException as error:
            _record_failure(folder, tracker, error)
            raise
    return result


def _execute(run: _Run) -> RunResult:
    start = time.perf_counter()
    source = ModelSource(run.plan.recipe.model, run.settings.runtime.trust_remote_code)
    _open_record(run)
    with run.step("data", "Reading data"):
        calibration, evaluation = _read_data(run, source.tokenizer())
        run.tracker.ready()  # opened beside the reading; a store that cannot be opened must not cost a calibration
    with run.step("load", "Loading the model"):
        model = source.load(run.device)
        run.digests["model"] = source.digest()
        model = wrap_model(model, run.plan.specs())
    walker = _calibrate(run, model, calibration)
    quality = _measure(run, model, evaluation)
    with run.step("convert", "Converting"):
        model, outputs = _convert(model, evaluation, run)
    with run.step("save", "Saving and checking the saved model"), run.folder.all_or_none(WEIGHTS, MANIFEST):
        _save(run, model, walker, source)
        _check_saved(run, evaluation, outputs)
    exported = _export(run, model)
    with run.step("kernels", "Measuring kernels"):
        run.kernels = record_kernels(model, run.settings.runtime.kernels, run.folder, run.tracker)
    run.seconds["total"] = time.perf_counter() - start
    return _close_record(run, quality, exported)


def _open_record(run: _Run) -> None:
    """The run is on record before anything is loaded."""
    plan, recipe = run.plan, run.plan.recipe
    run.folder.write_status("RUNNING", recipe=recipe.name)
    run.folder.write_text("recipe.yaml", to_yaml(recipe))
    run.folder.write_text("plan.json", plan.model_dump_json(indent=1) + "\n")
    run.digests |= {"recipe": recipe.digest(), "plan": plan.digest()}
    versions = {f"version.{name}": version for name, version in environment().items()}
    tags = {"recipe": recipe.name, "description": recipe.description, "folder": str(run.folder.path.resolve())}
    tags |= {**versions, "device": device_class(run.device), **_digest_tags(run)}
    run.tracker.start(recipe.name, tags, recipe.model_dump(), wait=False)


def _read_data(run: _Run, tokenizer: Any) -> tuple[Samples | None, Samples]:
    """Calibration samples, None where no stage looks at data, and evaluation samples."""
    recipe, calibration = run.plan.recipe, None
    if run.plan.needs_calibration:
        config = recipe.calibration
        source = make_source(config.source, config.options)
        calibration = build_samples(source, tokenizer, config.samples, config.seq_len, config.seed, config.pack)
        _record_data(run, "calibration", source, calibration)
    measured = recipe.evaluation
    source = make_source(measured.source, measured.options)
    windows = max(1, measured.tokens // measured.seq_len)
    evaluation = build_samples(source, tokenizer, windows, measured.seq_len, seed=None)
    _record_data(run, "evaluation", source, evaluation)
    if calibration is not None and calibration.digest == evaluation.digest:
        run.note("calibration and evaluation read the same tokens: the quality measured is too good")
    return calibration, evaluation


def _record_data(run: _Run, context: str, source: Source, samples: Samples) -> None:
    for text in samples.notes:
        run.note(f"{context}: {text}")
    run.digests[context] = samples.digest
    profile = {"tokens": samples.tokens, "windows": len(samples.input_ids), "seq_len": samples.input_ids.shape[1]}
    run.tracker.dataset(source.describe(), samples.digest, source.describe(), context, profile)


def _calibrate(run: _Run, model: nn.Module, samples: Samples | None) -> Walker:
    """Decide every point: round weights, choose activation ranges."""
    config = run.plan.recipe.calibration
    batches = [] if samples is None else _batches(samples, config.batch_size, run.device)
    rounders: dict[str, Rounder] = {}
    setters: dict[str, RangeSetter] = {}
    for stage in run.plan.stages:
        kind = ALGORITHMS.get(stage.algorithm)
        algorithm = kind(kind.Options(**stage.options))
        table: dict[str, Any] = rounders if isinstance(algorithm, Rounder) else setters
        table |= dict.fromkeys(stage.targets, algorithm)
    walker = Walker(model, rounders, setters)
    keeper = Keeper(run.folder, _fingerprint(run))
    border = keeper.take_up(walker, run.device)
    if border is not None:
        run.note(f"resumed before block {border.index}; what was decided before is kept")
    walker.on_border = partial(keeper.keep, walker)
    title = "Calibrating" if batches else "Rounding weights"
    with run.step("calibrate", title, *walker.steps(batches, config.schedule)) as advance:
        walker.advance = advance
        walker.run(batches, config.schedule, border)
    for reason in walker.fallbacks:
        run.note(f"rounded to nearest instead: {reason}")
    run.tracker.metrics({"fallbacks": len(walker.fallbacks)})
    return walker


def _fingerprint(run: _Run) -> dict[str, str]:
    """What must be equal for a run to be taken up."""
    digests = {key: run.digests[key] for key in ("model", "plan", "calibration") if key in run.digests}
    machine = {"device": device_class(run.device), "environment": json.dumps(environment(), sort_keys=True)}
    return digests | machine | {"code": code_digest()}


def _measure(run: _Run, model: nn.Module, samples: Samples) -> Quality:
    size = run.plan.recipe.evaluation.batch_size
    with run.step("evaluate", "Measuring quality", -(-len(samples.input_ids) // size), "batch") as advance:
        quality = measure_stages(model, samples, size, advance)
    for stage, metrics in quality.stages.items():
        run.tracker.metrics({f"{stage}/{name}": value for name, value in metrics.items() if name != "tokens"})
    run.tracker.curves(quality.curves)
    return quality


def _convert(model: nn.Module, samples: Samples, run: _Run) -> tuple[nn.Module, Tensor]:
    """The converted model and its logits on the first batch, which must be those of the model it comes from."""
    before = _first_logits(model, samples)
    model = convert_model(model)
    after = _first_logits(model, samples)
    if not torch.equal(before, after):
        difference = (before - after).abs().max().item()
        raise ModelError(
            f"conversion changed the outputs (largest difference {difference:g}); this is a defect of wrapq"
        )
    run.digests["outputs"] = tensors_digest({"logits": after})
    return model, after


def _save(run: _Run, model: nn.Module, walker: Walker, source: ModelSource) -> None:
    qparams = qparams_tensors(model)
    run.digests["qparams"] = tensors_digest(qparams)
    save_model(model, run.folder)
    own = {name: tensor.clone() for name, tensor in qparams.items()}  # tied weights share theirs, which a file may not
    run.folder.write("qparams.safetensors", lambda path: save_file(own, path))
    run.folder.write_text("modules.json", json.dumps(walker.reports, indent=1) + "\n")
    run.tracker.curves(_weight_curves(walker))
    if walker.statistics:
        run.folder.write("statistics.safetensors", lambda path: save_file(walker.statistics, path))
    run.folder.write_files(source.tokenizer().save_pretrained)
    lock = lock_text(run.plan.recipe.model_dump(mode="json"), run.digests, run.device)
    run.folder.write_text("recipe.lock.yaml", lock)


def _weight_curves(walker: Walker) -> dict[str, list[float]]:
    """For each weight of a block, such as `mlp.down_proj`, its figures over the blocks."""
    curves: dict[str, list[float]] = {}
    for where, report in walker.reports.items():
        if walker.blocks.index(where) is not None:
            weight = where.removeprefix(walker.blocks.prefix).split(".", 2)[2].removesuffix(".weight")
            for figure in ("weight_sqnr_db", "output_error"):
                if figure in report:
                    curves.setdefault(f"{figure}/{weight}", []).append(report[figure])
    return curves


def _check_saved(run: _Run, samples: Samples, outputs: Tensor) -> None:
    """The files give back the model, to the bit."""
    if not torch.equal(_first_logits(load(run.folder.path, run.device), samples), outputs):
        raise ModelError(f"{run.folder.path / WEIGHTS} loads as a model with other outputs; this is a defect of wrapq")


def _export(run: _Run, model: nn.Module) -> Exported | None:
    if run.plan.recipe.export.format == NONE:
        return None
    with run.step("export", "Exporting and loading the export"):
        exported = export_model(model, run.plan, run.folder.path)
    for text in exported.notes if exported else ():
        run.note(f"export: {text}")
    return exported


def _close_record(run: _Run, quality: Quality, exported: Exported | None) -> RunResult:
    sizes = {FLOAT: run.plan.estimate.float_bytes, QUANTIZED: (run.folder.path / WEIGHTS).stat().st_size}
    facts = {
        "stages": quality.stages,
        "sizes": sizes,
        "seconds": run.seconds,
        "digests": run.digests,
        "notes": run.notes,
        "kernels": run.kernels,
    }
    if exported is not None:
        sizes[EXPORTS] = exported.size
        facts["exported"] = {"path": str(exported.path), "error": exported.error}
        run.tracker.metrics({"export/relative_error": exported.error})
    run.folder.write_status("FINISHED", recipe=run.plan.recipe.name, **facts)
    run.tracker.tags(_digest_tags(run))
    run.tracker.metrics({f"size/{stage}_mb": size / 1e6 for stage, size in sizes.items()})
    run.tracker.metrics({f"seconds/{step}": value for step, value in run.seconds.items()})
    if (bits := run.plan.estimate.bits_per_weight) is not None:
        run.tracker.metrics({"bits_per_weight": bits})
    for name in _ARTIFACTS:
        if (run.folder.path / name).exists():
            run.tracker.artifact(run.folder.path / name)
    run_id, url = run.tracker.run_id, run.tracker.run_url
    run.tracker.finish()
    Keeper(run.folder, {}).clear()
    notes = (*run.notes, *run.tracker.problems)
    return RunResult(
        run.folder.path, quality.stages, sizes, run.seconds, run.digests, notes, run_id, url, exported, run.kernels
    )


_ARTIFACTS = (
    "recipe.yaml",
    "plan.json",
    "recipe.lock.yaml",
    "manifest.json",
    "modules.json",
    "qparams.safetensors",
    "statistics.safetensors",
    KERNELS_FILE,
    "log.txt",
)


def _record_failure(folder: RunFolder, tracker: Tracker, error: BaseException) -> None:
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    _log.error("failed: %s", reason)
    try:
        folder.write_status("FAILED", reason=reason)
    except Exception as second:  # a full disk may be the very reason; the first error is the one to show
        _log.error("the folder cannot say so: %s", second)
    tracker.finish("FAILED", reason)


def _digest_tags(run: _Run) -> Mapping[str, str]:
    return {f"digest.{name}": digest for name, digest in run.digests.items()}


def _first_logits(model: nn.Module, samples: Samples) -> Tensor:
    ids, mask = next(samples.batches(1))
    device = next(model.parameters()).device
    with torch.no_grad():
        return forward_logits(model, ids.to(device), None if mask is None else mask.to(device)).cpu()


def _batches(samples: Samples, size: int, device: torch.device) -> list[Batch]:
    batches = []
    for ids, mask in samples.batches(size):
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        batches.append(Batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask))
    return batches


def use_machine(settings: Settings, seed: int) -> torch.device:
    """Threads, seed and device as the settings say."""
    if settings.runtime.threads:
        torch.set_num_threads(settings.runtime.threads)
    torch.manual_seed(seed)
    name = settings.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"runtime.device={settings.runtime.device}: this machine has no CUDA device; use cpu or auto")
    return torch.device(name)
