"""Converting, saving and loading a model one block at a time, so that it never is in memory whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.blocks import Blocks, find_blocks
from wrapq.calibration.processes import Processes
from wrapq.calibration.residency import Residency
from wrapq.engine.checkpoint import (
    WEIGHTS,
    Saved,
    assign,
    describe_model,
    module_digests,
    qparams_tensors,
    read_manifest,
    rebuild,
    tensor_named,
    unique_tensors,
    weight_files,
)
from wrapq.engine.folder import RunFolder
from wrapq.errors import PlanError, Problem
from wrapq.recipe.schema import Settings
from wrapq.resolve.exporter import NONE
from wrapq.resolve.plan import Plan
from wrapq.resolve.shards import Shards
from wrapq.wrappers.model import convert_model, iter_wrapped

INDEX = f"{WEIGHTS}.index.json"
"""Which file holds which tensor, in the form that is common for checkpoints of several files."""


def check_streaming(plan: Plan, settings: Settings, processes: Processes) -> None:
    """Raise `PlanError` where the settings ask for streaming and it cannot be done."""
    if settings.runtime.load != "streaming":
        return
    problems = []
    if not plan.model.block_count:
        problems.append((f"{plan.model.type} has no repeated blocks to bring in one at a time", "leave it out"))
    if plan.recipe.export.format != NONE:
        what = f"the export {plan.recipe.export.format} is made and compared with the whole model in memory"
        problems.append((what, "leave the export to `wrapq export`, where there is memory"))
    if plan.recipe.evaluation.compare_schedules:
        what = "the result of the other schedule is held in memory"
        problems.append((what, "set evaluation.compare_schedules=false, or use runtime.load=whole"))
    if processes.count > 1:
        problems.append(("several processes cannot stream one model yet", "use one process, or runtime.load=whole"))
    if any(stage.phase == "transform" for stage in plan.stages):
        what = "transforms change the float model as a whole before the first block is calibrated"
        problems.append((what, "leave runtime.load as it is, or remove the transforms"))
    if problems:
        raise PlanError([Problem("runtime.load", f"streaming: {what}", (), remedy) for what, remedy in problems])


def blockwise_files(blocks: Blocks) -> list[str]:
    """The names of the files that `save_blockwise` writes: one for each block, one for what is outside, the index."""
    count = blocks.count + 1
    return [*(f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)), INDEX]


def save_blockwise(model: nn.Module, residency: Residency, folder: RunFolder) -> Saved:
    """Convert a wrapped model and write it into `folder`, a file for each block and one for what is outside.

    Afterwards `model` is the converted one, without data in its blocks.
    """
    for old in weight_files(folder.path):  # of a run that was killed here and taken up again
        old.unlink()
    qparams: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    tied: dict[str, str] = {}
    places: dict[str, str] = {}
    blocks = find_blocks(model)
    files = blockwise_files(blocks)
    for index, (name, file) in enumerate(zip([*blocks.names(), ""], files, strict=False)):
        with residency.holding(index):
            part = _converted(model, name)
            tensors, same = unique_tensors(part)
            tensors = {_full(name, key): tensor for key, tensor in tensors.items()}
            tied |= {_full(name, key): _full(name, other) for key, other in same.items()}
            qparams |= {_full(name, key): t.clone() for key, t in qparams_tensors(part).items() if not t.is_meta}
            modules |= {_full(name, key): digest for key, digest in module_digests(part).items()}
            folder.write(file, partial(save_file, tensors, metadata={"format": "pt"}))
            places |= dict.fromkeys(tensors, file)
            if name:
                part.to("meta")
    size = sum(file.stat().st_size for file in weight_files(folder.path))
    folder.write_text(INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n")
    digest = describe_model(model, Shards(weight_files(folder.path)), tied, folder)
    order = {name: modules[name] for name, _ in model.named_modules() if name in modules}
    return Saved(qparams, digest, order)


def _converted(model: nn.Module, name: str) -> nn.Module:
    """The part `name` of the model, which is converted in its place."""
    part = model.get_submodule(name)
    if next(iter_wrapped(part), None) is None:
        return part
    part = convert_model(part)
    if name:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = part
    return part


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class SavedBlocks(Residency):
    """The blocks of a converted model, brought in from its files one at a time.

    Args:
        model: the model, without data in its blocks.
        weights: the tensors of its files.
        tied: for each tensor that the files leave out the name that holds it.
        device: where the model runs.
    """

    streamed = True

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], tied: Mapping[str, str], device: torch.device
    ) -> None:
        self.model, self.weights, self.tied, self.device = model, weights, tied, device
        self.blocks = find_blocks(model)

    def bring(self, block: int) -> None:
        """Read the block's tensors."""
        for name in self._of(block, self.weights):
            assign(self.model, name, self.weights[name].to(self.device))
        for name in self._of(block, self.tied):
            assign(self.model, name, tensor_named(self.model, self.tied[name]))

    def release(self, block: int) -> None:
        """Forget the block's tensors."""
        for name in (*self._of(block, self.weights), *self._of(block, self.tied)):
            assign(self.model, name, torch.empty_like(tensor_named(self.model, name), device="meta"))

    def _of(self, block: int, names: Mapping[str, object]) -> Iterator[str]:
        return (name for name in names if self.blocks.index(name) == block)


def load_blockwise(path: Path, device: torch.device, blocks: Blocks) -> tuple[nn.Module, Residency]:
    """The quantized model in the folder `path`, without the tensors of its `blocks`, and what brings those in.

    Raises:
        ModelError: see `wrapq.load`.
    """
    manifest, weights = read_manifest(path), Shards(weight_files(path))
    model = rebuild(path, manifest, weights, device, lambda name: blocks.index(name) is None)
    return model.eval().requires_grad_(False), SavedBlocks(model, weights, manifest["tied"], device)
