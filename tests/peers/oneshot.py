"""llm-compressor's `oneshot`, for `jobs.py`.

A job is a mapping: `model`, `dtype`, `out` and `recipe` (YAML); for a recipe that looks at data `tokens`,
a `.safetensors` file of ids [S, T], and if need be `batch_size` and `pipeline`; `dense: true` to save the weights as
they are after quantization, under the names of the float model, in `out/model.safetensors` alone; `logits`, another
file of ids, to save what the model that is left in memory computes for them [S, T, V], in `out/logits.safetensors`;
`states`, one more, to save what its body computes [S, T, K] and the weight of its head [V, K], from which those logits
can be had a part at a time, in `out/states.safetensors`; none of these for the files that it would save for a user.
It takes `seconds` and `cpu`, which are those of `oneshot` alone.
"""

import time
from pathlib import Path

import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

if not torch.accelerator.is_available():  # 0.14's AWQ pins memory whatever the device, which fails there
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def run(job: dict) -> dict:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    torch.manual_seed(0)
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(model=model, recipe=job["recipe"], **calibration(job))
    took = {"seconds": round(time.perf_counter() - start, 2), "cpu": round(time.process_time() - cpu, 2)}
    out = Path(job["out"])
    if job.get("dense"):
        out.mkdir(parents=True, exist_ok=True)
        save_file(dense_weights(model), out / "model.safetensors")
    elif "logits" in job:
        out.mkdir(parents=True, exist_ok=True)
        save_file({"logits": logits(model, job)}, out / "logits.safetensors")
    elif "states" in job:
        out.mkdir(parents=True, exist_ok=True)
        save_file(states(model, job), out / "states.safetensors")
    else:
        model.save_pretrained(out, save_compressed=True)
    return took


def calibration(job: dict) -> dict:
    if "tokens" not in job:
        return {}
    ids = next(iter(load_file(job["tokens"]).values())).long()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    return {
        "dataset": Dataset.from_dict(rows),
        "num_calibration_samples": len(ids),
        "max_seq_length": ids.shape[1],
        "shuffle_calibration_samples": False,
        "batch_size": job.get("batch_size", 8),
        "pipeline": job.get("pipeline", "sequential"),
        "processor": object(),  # the tokens are ready; without one a tokenizer is demanded
    }


@torch.no_grad()
def logits(model: torch.nn.Module, job: dict) -> torch.Tensor:
    """What the quantized model computes for the ids of `job["logits"]`."""
    ids = next(iter(load_file(job["logits"]).values())).long()
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(job.get("batch_size", 8))])


@torch.no_grad()
def states(model: torch.nn.Module, job: dict) -> dict[str, torch.Tensor]:
    """What the quantized body computes for the ids of `job["states"]`, and the weight of the head."""
    ids = next(iter(load_file(job["states"]).values())).long()
    found = [model.model(input_ids=part, use_cache=False)[0] for part in ids.split(job.get("batch_size", 8))]
    return {"states": torch.cat(found), "head": model.lm_head.weight.detach().clone()}


@torch.no_grad()
def dense_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that quantized linear layers multiply with, and those of norms."""
    norms = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("norm.weight")}  # may be scaled
    return norms | {
        f"{name}.weight": forward_quantize(module, module.weight, "weight", scheme.weights).detach().contiguous()
        for name, module in model.named_modules()
        if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None
    }
