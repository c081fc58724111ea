"""What transformers computes through GPTQModel from exports, and the weights that GPTQModel's own code unpacks.

As a script, `gptqmodel_reader.py RELOAD FOLDER...` with the path of `wrapq/export/reload.py` reads the token ids in
`ids.safetensors` in each folder and leaves `logits` and the weights of the quantized layers in `read.safetensors`. It
runs in an environment that has GPTQModel, with nothing of wrapq imported.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear, PackableQuantLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file


def weight_of(layer: Any) -> torch.Tensor:
    """The weight [N, K] of a layer, in the dtype of its scales."""
    if isinstance(layer, PackableQuantLinear):
        weight = PackableQuantLinear.dequantize_weight(layer)
    else:
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size)
    return weight.t().contiguous()


@torch.no_grad()
def main(reload: str, *folders: str) -> None:
    """See the module."""
    load = runpy.run_path(reload)["_load"]
    for folder in map(Path, folders):
        model, _ = load(str(folder))
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseQuantLinear)}
        read = {name: weight_of(layer) for name, layer in layers.items()}
        read["logits"] = model(input_ids=load_file(folder / "ids.safetensors")["ids"], use_cache=False).logits.float()
        save_file(read, folder / "read.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
