"""What vLLM computes from exports on a CPU.

As a script, `vllm_reader.py IDS FOLDER...` reads the token ids [1, T] in the file IDS, and leaves beside each folder,
in `vllm.safetensors`, the `logprobs` [T - 1, V] of what follows each of them but the last, and the `tokens` [N] with
which it goes on, each the likeliest. It runs in an environment that has vLLM, with nothing of wrapq imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKENS = 32


def unpack_experts() -> None:
    """Have vLLM's own loader fill the packed experts of a layer, and its float experts compute with them unpacked: on a
    CPU it has a kernel for packed ones where there is AMX only."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as packed,
    )

    def dense(weights: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.nn.Parameter:
        shape = torch.Size((weights.shape[1], weights.shape[2] * 32 // bits))
        codes = torch.stack([unpack_from_int32(each, bits, shape) for each in weights]).to(scales.dtype)
        made = codes.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]
        return torch.nn.Parameter(made.flatten(-2), requires_grad=False)

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        for part in ("w13", "w2"):
            stored, scales = getattr(layer, f"{part}_weight_packed"), getattr(layer, f"{part}_weight_scale")
            layer.register_parameter(f"{part}_weight", dense(stored, scales, self.num_bits))
        layer.quant_method = UnquantizedFusedMoEMethod(self.moe)
        layer.quant_method.process_weights_after_loading(layer)

    packed.select_wna16_moe_backend = lambda **_: (packed.WNA16MoEBackend.EMULATION, None)
    packed.CompressedTensorsWNA16MoEMethod.process_weights_after_loading = process_weights_after_loading


def main(file: str, *folders: str) -> None:
    """See the module."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import HadamardTransform

    # 0.32 rotates on GPUs only: on a CPU it looks for a product in this class that it makes for other layers
    HadamardTransform.cpu_linear = staticmethod(torch.nn.functional.linear)
    unpack_experts()
    length = {"max_tokens": TOKENS, "min_tokens": TOKENS, "ignore_eos": True}
    asked = SamplingParams(temperature=0, detokenize=False, prompt_logprobs=-1, **length)
    ids = load_file(file)["ids"][0].tolist()
    sizes = {"max_model_len": len(ids) + TOKENS, "max_num_seqs": 1, "max_logprobs": -1}
    for folder in map(Path, folders):
        model = LLM(str(folder), enforce_eager=True, skip_tokenizer_init=True, **sizes)
        (found,) = model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        rows = [[row[token].logprob for token in range(len(row))] for row in found.prompt_logprobs[1:]]
        tokens = torch.tensor(found.outputs[0].token_ids)
        save_file({"logprobs": torch.tensor(rows), "tokens": tokens}, folder.parent / "vllm.safetensors")
        del model


if __name__ == "__main__":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    main(*sys.argv[1:])
