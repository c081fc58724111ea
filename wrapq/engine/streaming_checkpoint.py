"""Converting, saving and loading a model block by block, so that it is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wrapq.calibration.block_loader import BlockLoader
from wrapq.calibration.processes import Processes
from wrapq.errors import PlanError, Problem
from wrapq.graph.blocks import Blocks, find_blocks
from wrapq.recipe.schema import Settings
from wrapq.resolve.plan import Plan
from wrapq.resolve.shards import Shards
from wrapq.resolve.stages import algorithm_of
from wrapq.runs.checkpoint import (
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
    weight_bytes,
    weight_files,
)
from wrapq.runs.folder import RunFolder, remove
from wrapq.wrappers.model import convert_model, iter_wrapped

INDEX = f"{WEIGHTS}.index.json"
"""The file of each tensor, in the common format of sharded checkpoints."""


def check_streaming(plan: Plan, settings: Settings, processes: Processes) -> None:
    """Raise `PlanError` where the settings ask for streaming and it is not possible."""
    if settings.runtime.load != "streaming":
        return
    problems = []
    if not plan.model.block_count:
        problems.append((f"{plan.model.type} has no repeated blocks to bring in one at a time", "leave it out"))
    if plan.recipe.model.dequantize:
        what = "a checkpoint that is quantized already is taken apart as a whole"
        problems.append((what, "use runtime.load=whole"))
    if plan.recipe.export:
        what = f"the export {', '.join(plan.recipe.export)} is made and compared with the whole model in memory"
        problems.append((what, "leave the export to `wrapq export`, where there is memory"))
    if plan.parts:
        what = f"PT2E calibrates {plan.parts[0].name} in forwards of the whole model"
        problems.append((what, "use runtime.load=whole"))
    if plan.recipe.evaluation.compare_schedules:
        what = "the result of the other schedule is held in memory"
        problems.append((what, "set evaluation.compare_schedules=false, or use runtime.load=whole"))
    if processes.count > 1:
        problems.append(("several processes cannot stream one model yet", "use one process, or runtime.load=whole"))
    if any("gradient" in algorithm_of(stage).needs for stage in plan.stages):
        what = "gradients go back through the float model as a whole"
        problems.append((what, "leave runtime.load as it is, or set gradient: false in the stage"))
    if any(stage.phase == "transform" for stage in plan.stages):
        what = "transforms change the float model as a whole before the first block is calibrated"
        problems.append((what, "leave runtime.load as it is, or remove the transforms"))
    if problems:
        raise PlanError([Problem("", "runtime.load", f"streaming: {what}", (), remedy) for what, remedy in problems])


def streamed_files(blocks: Blocks) -> list[str]:
    """The names of the files that `save_streamed` writes: one for each block, one for what is outside, the index."""
    count = blocks.count + 1
    return [*(f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)), INDEX]


def save_streamed(model: nn.Module, loader: BlockLoader, folder: RunFolder) -> Saved:
    """Convert a wrapped model and write it into `folder`, a file for each block and one for what is outside.

    Afterwards `model` is the converted one, without data in its blocks.
    """
    for old in weight_files(folder.path):  # of a run that was killed here and is resumed
        remove(old)
    qparams: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    tied: dict[str, str] = {}
    places: dict[str, str] = {}
    blocks = find_blocks(model)
    files = streamed_files(blocks)
    for index, (name, file) in enumerate(zip([*blocks.names(), ""], files, strict=False)):
        prefix = f"{name}." if name else ""
        with loader.loaded(index):
            part = _converted(model, name)
            tensors, same = unique_tensors(part)
            tensors = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
            tied |= {f"{prefix}{key}": f"{prefix}{other}" for key, other in same.items()}
            qparams |= {f"{prefix}{key}": t.clone() for key, t in qparams_tensors(part).items() if not t.is_meta}
            modules |= {f"{prefix}{key}": digest for key, digest in module_digests(part).items()}
            folder.write(file, partial(save_file, tensors, metadata={"format": "pt"}))
            places |= dict.fromkeys(tensors, file)
            if name:
                part.to("meta")
    facts = {"metadata": {"total_size": weight_bytes(folder.path)}, "weight_map": places}
    folder.write_text(INDEX, json.dumps(facts, indent=1) + "\n")
    digest = describe_model(model, Shards(weight_files(folder.path)), tied, folder)
    order = {name: modules[name] for name, _ in model.named_modules() if name in modules}
    return Saved(qparams, digest, order)


def _converted(model: nn.Module, name: str) -> nn.Module:
    """Convert the part `name` of the model in place."""
    part = model.get_submodule(name)
    if next(iter_wrapped(part), None) is not None:
        part = convert_model(part)
        if name:
            model.set_submodule(name, part)
    return part


class SavedBlocks(BlockLoader):
    """The blocks of a converted model, read one at a time from the `weights` in its files, which leave out those `tied`
    to another."""

    streamed = True

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], tied: Mapping[str, str], device: torch.device
    ) -> None:
        self.model, self.weights, self.tied, self.device = model, weights, tied, device
        self.blocks = find_blocks(model)

    def load(self, block: int) -> None:
        for name in self._of(block, self.weights):
            assign(self.model, name, self.weights[name].to(self.device))
        for name in self._of(block, self.tied):
            assign(self.model, name, tensor_named(self.model, self.tied[name]))

    def release(self, block: int) -> None:
        for name in (*self._of(block, self.weights), *self._of(block, self.tied)):
            assign(self.model, name, torch.empty_like(tensor_named(self.model, name), device="meta"))

    def _of(self, block: int, names: Mapping[str, object]) -> Iterator[str]:
        return (name for name in names if self.blocks.index(name) == block)


def load_streamed(
    path: Path, device: torch.device, blocks: Blocks, trust_remote_code: bool
) -> tuple[nn.Module, BlockLoader]:
    """The quantized model in the folder `path`, without the tensors of its `blocks`, and what loads those."""
    manifest, weights = read_manifest(path), Shards(weight_files(path))
    model = rebuild(path, manifest, weights, device, lambda name: blocks.index(name) is None, trust_remote_code)
    return model.eval().requires_grad_(False), SavedBlocks(model, weights, manifest["tied"], device)
