"""The end of a run: convert the model, save it, load and compare it, export it, measure kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.block_loader import BlockLoader
from wrapq.calibration.finalize import release
from wrapq.calibration.scheduler import run_blocks
from wrapq.calibration.walker import Walker
from wrapq.data.samples import Samples
from wrapq.engine.beside_float import FloatBeside
from wrapq.engine.context import Run
from wrapq.engine.export import Exported, export_model
from wrapq.engine.histograms import block_curves, value_histograms
from wrapq.engine.kernels import record_kernels
from wrapq.engine.measure import Quality, device_of, forward_logits
from wrapq.engine.run_data import read_tokenizer, sources_of
from wrapq.engine.streaming_checkpoint import INDEX, load_streamed, save_streamed, streamed_files
from wrapq.errors import ModelError
from wrapq.graph.blocks import find_blocks
from wrapq.large_pages import give_back
from wrapq.observers.forward_context import in_context
from wrapq.runs.checkpoint import Saved, load, manifest_digest, name_files, save_model, tensors_digest
from wrapq.runs.folder import HISTOGRAMS, LOCK, MANIFEST, MODULES, PLAN, QPARAMS, RECIPE, STATISTICS, WEIGHTS
from wrapq.runs.lock import SEQUENCES, Lock, code_digest, device_class, environment
from wrapq.runtime.kernel import REFERENCE
from wrapq.wrappers.model import convert_model

_CHECKED = 128
"""Tokens on which the saved model is compared: a difference in any weight or point shows in all of them."""


def save_and_export(run: Run, walker: Walker, evaluation: Samples, quality: Quality) -> dict[str, Exported]:
    """Convert, save, check, export, and measure kernels; a streamed model is converted, saved and checked only.

    The saved model must have the outputs of the wrapped one.
    """
    model, loader, streaming, folder = walker.model, walker.options.loader, run.streaming, run.folder
    with run.step("convert", "Computing what the saved model must give" if streaming else "Converting"):
        values = value_histograms(walker, weights=not streaming)
        expected = _first_logits(model, evaluation, loader)
        run.digests["outputs"] = tensors_digest({"logits": expected})
        if not streaming:
            release(walker.points())
            model = convert_model(model, frees=True)
    title = "Converting, saving and checking block by block" if streaming else "Saving and checking the saved model"
    files = streamed_files(walker.blocks) if streaming else [WEIGHTS]
    trust = run.settings.runtime.trust_remote_code
    with run.step("save", title), folder.all_or_none(MANIFEST, *files):
        saved = save_streamed(model, loader, folder) if streaming else save_model(model, folder)
        _save_record(run, saved, walker, values, quality)
        give_back()  # a tokenizer of many words takes as much memory as a model
        if streaming:
            found, loader = load_streamed(folder.path, run.device, walker.blocks, trust)
        else:
            found = load(folder.path, run.device, trust_remote_code=trust)
        _check_saved(run, _first_logits(found, evaluation, loader), expected)
        del found  # one model is enough in memory for what follows
    if streaming:
        if run.settings.runtime.kernels != REFERENCE:
            what = "kernels are not measured where blocks are streamed"
            run.note(f"{what}; wrapq.load(..., runtime='auto') measures them")
        return {}
    # without padding, which the formats would have to be told of
    ids = evaluation.input_ids if evaluation.attention_mask is None else None
    beside, exports = FloatBeside(run.settings, run.digests["model"]), {}
    for name in run.plan.recipe.export:
        with run.step(f"export_{name}", f"Exporting to {name} and loading that"):
            exports[name] = export_model(model, name, run.plan, folder.path, beside, ids=ids)
        for text in exports[name].notes:
            run.note(f"{name}: {text}")
    with run.step("kernels", "Measuring kernels"):
        record_kernels(run, model)
    return exports


def _save_record(run: Run, saved: Saved, walker: Walker, values: Mapping[str, Any], quality: Quality) -> None:
    """Write parameters, reports, histograms, statistics, tokenizer and lock beside the model's files."""
    folder, result = run.folder, walker.result
    run.digests |= {"qparams": tensors_digest(saved.qparams), "tensors": saved.digest}
    # tied weights share theirs, which a file may not
    own = {name: tensor.clone() for name, tensor in saved.qparams.items()}
    folder.write(QPARAMS, lambda path: save_file(own, path))
    folder.write_text(MODULES, json.dumps(result.reports, indent=1) + "\n")
    folder.write_text(HISTOGRAMS, json.dumps(values) + "\n")
    run.tracker.curves(block_curves(walker))
    if result.statistics:
        folder.write(STATISTICS, lambda path: save_file(result.statistics, path))
    names = [RECIPE, PLAN, MODULES, HISTOGRAMS, QPARAMS, STATISTICS, INDEX]
    if (tokenizer := read_tokenizer(run.source, sources_of(run.plan))) is not None:
        for where in ("is_local", "local_files_only"):  # equal runs have equal files
            tokenizer.init_kwargs.pop(where, None)
        names += folder.write_files(tokenizer.save_pretrained)
    for name, text in run.source.processor_files().items():
        if name not in names:  # a chat template is the tokenizer's too
            folder.write_text(name, text)
            names.append(name)
    name_files(folder, names)
    lock = Lock(
        recipe=run.plan.recipe,
        presets=run.plan.presets,
        digests=run.digests | {"code": code_digest(), "manifest": manifest_digest(folder.path)},
        environment=environment(),
        device=device_class(run.device),
        metrics=quality.stages,
        modules=dict(saved.modules),
        sequences=SEQUENCES,
    )
    folder.write_text(LOCK, lock.to_yaml())


def _check_saved(run: Run, outputs: Tensor, expected: Tensor) -> None:
    """Raise `ModelError` unless the saved model has the expected outputs, to the bit."""
    if not torch.equal(outputs, expected):
        difference = (outputs - expected).abs().max().item()
        raise ModelError(
            f"{run.folder.path} loads as a model with other outputs than the one it was converted from (largest "
            f"difference {difference:g}); this is a defect of wrapq"
        )


@torch.no_grad()
def _first_logits(model: nn.Module, samples: Samples, loader: BlockLoader) -> Tensor:
    """The logits [1, T, V] of the first tokens of the first sample; of all of them where some are padding."""
    ids, mask, _ = next(samples.batches(1, device_of(model)))
    ids = ids if mask is not None else ids[:, :_CHECKED]
    logits = []

    def forward() -> None:
        with in_context(batch=0):
            logits.append(forward_logits(model, ids, mask).cpu())

    layers = [model.get_submodule(name) for name in find_blocks(model).names()]
    run_blocks(layers, [forward], loader=loader)
    return logits[0]
