"""Rotations at each forward in the words of compressed-tensors, its `transform_config`: what a reader multiplies the
inputs of layers with before anything else is done to them.

compressed-tensors 0.20 multiplies them with the matrix that the checkpoint holds, divided by the root of its size, in
float32; vLLM 0.32 (`compressed_tensors/transform/module.py`) does so in the model's dtype. A type of `random-hadamard`
has them read the matrix; one of `hadamard` would have them make their own, which has no signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wrapq.resolve.plan import Plan
from wrapq.runtime.rotation import ONLINE, OnlineRotation

_SMALL = 128


class TransformConfig(NamedTuple):
    """What a checkpoint says of its rotations.

    Attributes:
        section: the `transform_config`; empty where nothing is rotated.
        tensors: the matrices, each with the first of the layers that it is for.
    """

    section: dict[str, Any]
    tensors: dict[str, Tensor]


def rotated_layers(plan: Plan) -> dict[str, int]:
    """The linear layers whose input a Hadamard matrix rotates at each forward, with how many channels at a time."""
    return {name: size for stage in plan.stages for name, size in stage.hadamard.items()}


def rotation_notes(plan: Plan) -> Iterator[str]:
    """What vLLM does otherwise with the rotations of each stage."""
    for stage in plan.stages:
        if stage.hadamard:
            size = max(stage.hadamard.values())
            what = f"vLLM rotates inputs at each forward on GPUs only, by matrices of {size} x {size} or less"
            yield f"{what}; block=128 in stack.{stage.name} makes them small" if size > _SMALL else what


def transform_config(model: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> TransformConfig:
    """What is said of the rotations of `layers` in a converted `model` that computes in `dtype`."""
    names: dict[tuple[int, ...], list[str]] = {}
    matrices: dict[tuple[int, ...], Tensor] = {}
    for name in layers:
        rotation = cast(OnlineRotation, model.get_submodule(f"{name}.{ONLINE}"))
        key = tuple(rotation.signs.tolist())
        names.setdefault(key, []).append(name)
        # what `x` is multiplied with, but for its norm: 1 and -1, which are exact in every dtype
        matrices[key] = rotation.signs[:, None] * torch.kron(rotation.left, rotation.right)
    groups, tensors = {}, {}
    for index, (key, targets) in enumerate(names.items()):
        apply = {"targets": targets, "location": "input", "inverse": False, "ignore": []}
        groups[f"rotation_{index}"] = {"type": "random-hadamard", "apply": [apply], "head_dim": len(key)}
        tensors[f"{targets[0]}.rotation_{index}_input.weight"] = matrices[key].to(dtype)
    return TransformConfig({"config_groups": groups} if groups else {}, tensors)
