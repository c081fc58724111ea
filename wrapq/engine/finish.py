"""The end of a run: the model converted, saved, loaded again and compared, exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.data import Samples
from wrapq.calibration.residency import Residency, run_blockwise
from wrapq.calibration.walker import Walker
from wrapq.engine.blockwise import blockwise_files, load_blockwise, save_blockwise
from wrapq.engine.calibrate import weight_curves
from wrapq.engine.checkpoint import MANIFEST, WEIGHTS, Saved, load, save_model, tensors_digest
from wrapq.engine.context import Run
from wrapq.engine.export import Exported, export_model
from wrapq.engine.histograms import absmax_curves, value_histograms
from wrapq.engine.kernels import record_kernels
from wrapq.engine.lock import LOCK, Lock, code_digest, device_class, environment
from wrapq.engine.measure import Quality, device_of, forward_logits
from wrapq.engine.samples import read_tokenizer, sources_of
from wrapq.errors import ModelError
from wrapq.resolve.exporter import NONE
from wrapq.resolve.model import ModelSource
from wrapq.runtime.kernel import REFERENCE
from wrapq.wrappers.model import convert_model

_CHECKED = 128
"""Tokens on which the saved model is compared: what differs in a weight or a point shows in any of them."""


def finish(
    run: Run, model: nn.Module, walker: Walker, source: ModelSource, evaluation: Samples, quality: Quality
) -> Exported | None:
    """Convert, save, check, export, and measure kernels."""
    with run.step("convert", "Converting"):
        values = value_histograms(walker)
        outputs = _expected(run, model, evaluation)
        model = convert_model(model)
    with run.step("save", "Saving and checking the saved model"), run.folder.all_or_none(MANIFEST, WEIGHTS):
        saved = save_model(model, run.folder)
        _save_record(run, saved, walker, source, values, quality)
        _check_saved(run, _first_logits(load(run.folder.path, run.device), evaluation), outputs)
    exported = _export(run, model)
    with run.step("kernels", "Measuring kernels"):
        run.kernels = record_kernels(model, run.settings.runtime.kernels, run.folder, run.tracker)
    return exported


def finish_blockwise(run: Run, walker: Walker, source: ModelSource, evaluation: Samples, quality: Quality) -> None:
    """Convert, save and check, one block at a time; what is saved must have the outputs of the model it comes from."""
    with run.step("convert", "Computing what the saved model must give"):
        outputs = _expected(run, walker.model, evaluation, walker.residency)
    files = blockwise_files(walker.blocks)
    with run.step("save", "Converting, saving and checking block by block"), run.folder.all_or_none(MANIFEST, *files):
        saved = save_blockwise(walker.model, walker.residency, run.folder)
        _save_record(run, saved, walker, source, value_histograms(walker, weights=False), quality)
        model, residency = load_blockwise(run.folder.path, run.device, walker.blocks)
        _check_saved(run, _first_logits(model, evaluation, residency), outputs)
    if run.settings.runtime.kernels != REFERENCE:
        run.note("kernels are not measured where blocks are streamed; wrapq.load(..., runtime='auto') measures them")


def _save_record(
    run: Run, saved: Saved, walker: Walker, source: ModelSource, values: Mapping[str, Any], quality: Quality
) -> None:
    """What is written beside the model's own files."""
    run.digests |= {"qparams": tensors_digest(saved.qparams), "tensors": saved.digest}
    # tied weights share theirs, which a file may not
    own = {name: tensor.clone() for name, tensor in saved.qparams.items()}
    run.folder.write("qparams.safetensors", lambda path: save_file(own, path))
    run.folder.write_text("modules.json", json.dumps(walker.reports, indent=1) + "\n")
    run.folder.write_text("histograms.json", json.dumps(values) + "\n")
    run.tracker.curves(weight_curves(walker) | absmax_curves(walker))
    if walker.statistics:
        run.folder.write("statistics.safetensors", lambda path: save_file(walker.statistics, path))
    if (tokenizer := read_tokenizer(source, sources_of(run.plan))) is not None:
        run.folder.write_files(tokenizer.save_pretrained)
    lock = Lock(
        recipe=run.plan.recipe,
        presets=run.plan.presets,
        digests=run.digests | {"code": code_digest()},
        environment=environment(),
        device=device_class(run.device),
        metrics=quality.stages,
        modules=dict(saved.modules),
    )
    run.folder.write_text(LOCK, lock.to_yaml())


def _expected(run: Run, model: nn.Module, samples: Samples, residency: Residency | None = None) -> Tensor:
    """The logits [1, T, V] of the wrapped model, which the converted one must give once it is saved and loaded."""
    outputs = _first_logits(model, samples, residency)
    run.digests["outputs"] = tensors_digest({"logits": outputs})
    return outputs


def _check_saved(run: Run, outputs: Tensor, expected: Tensor) -> None:
    """The files give back the model, to the bit: neither converting nor saving nor loading changed it."""
    if not torch.equal(outputs, expected):
        difference = (outputs - expected).abs().max().item()
        raise ModelError(
            f"{run.folder.path} loads as a model with other outputs than the one it was converted from (largest "
            f"difference {difference:g}); this is a defect of wrapq"
        )


def _export(run: Run, model: nn.Module) -> Exported | None:
    if run.plan.recipe.export.format == NONE:
        return None
    with run.step("export", "Exporting and loading the export"):
        exported = export_model(model, run.plan, run.folder.path)
    for text in exported.notes if exported else ():
        run.note(f"export: {text}")
    return exported


@torch.no_grad()
def _first_logits(model: nn.Module, samples: Samples, residency: Residency | None = None) -> Tensor:
    """The logits [1, T, V] of the first tokens of the first sample; of all of them where some are padding."""
    ids, mask = next(samples.batches(1))
    ids = ids if mask is not None else ids[:, :_CHECKED]
    device, logits = device_of(model), []

    def forward() -> None:
        logits.append(forward_logits(model, ids.to(device), None if mask is None else mask.to(device)).cpu())

    if residency is None:
        forward()
    else:
        run_blockwise(model, residency, [forward])
    return logits[0]
