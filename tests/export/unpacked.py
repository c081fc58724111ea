"""The layouts of GPTQ and AWQ read by their descriptions alone: bits, one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""In which four bits of a word, from the lowest on, each of eight neighbours lies."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def integers(words: Tensor, bits: int) -> Tensor:
    """The integers in each row of int32 words [R, W], lowest bits first; int64 [R, 32 W / bits]."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    numbers = stream.reshape(len(stream), -1, bits).astype(np.int64) @ (1 << np.arange(bits))
    return torch.from_numpy(numbers)


def gptq_weight(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    """The weight [N, K] of a layer in GPTQ's layout."""
    codes = integers(tensors["qweight"].t(), said["bits"]).t()  # [K, N]
    zeros = integers(tensors["qzeros"], said["bits"]) + (said["checkpoint_format"] == "gptq")
    groups = tensors["g_idx"].long()
    if not said["desc_act"]:
        size = len(codes) if said["group_size"] == -1 else said["group_size"]
        assert torch.equal(groups, torch.arange(len(codes)) // size)
    return ((codes - zeros[groups]) * tensors["scales"][groups].float()).t()


def awq_weight(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Tensor:
    """The weight [N, K] of a layer in AWQ's layout."""
    codes, zeros = (
        integers(tensors[part], 4).unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1) for part in ("qweight", "qzeros")
    )
    size = len(codes) if said["group_size"] == -1 else said["group_size"]
    groups = torch.arange(len(codes)) // size
    return ((codes - zeros[groups]) * tensors["scales"][groups].float()).t()


WEIGHTS = {"gptq": gptq_weight, "awq": awq_weight}


def quantization_of(folder: Path) -> dict[str, Any]:
    """How `config.json` says that it is quantized."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def dequantized(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights [N, K] of the quantized layers of a checkpoint, float32 by their names, and its other tensors."""
    said, tensors = quantization_of(folder), load_file(folder / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    weights = {}
    for name in names:
        parts = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        weights[name] = WEIGHTS[said["quant_method"]](parts, said)
    return weights, tensors
