"""NNCF's `quantize`, W8A8 with static ranges, for `jobs.py`.

A job is a mapping: `model`, `tokens`, `states`, `out` as for `oneshot.py`, and `smooth`, whether NNCF uses
SmoothQuant. The body of the model is quantized in float32, in OpenVINO, one sequence at a time; its embedding is not,
nor is its head. It takes `seconds` and `cpu`.
"""

import time
from pathlib import Path

import nncf
import openvino
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


class Body(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.body = model.model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        every = torch.ones_like(
            input_ids
        )  # else transformers looks for several sequences in one, which has no converter
        return self.body(input_ids=input_ids, attention_mask=every, use_cache=False).last_hidden_state


@torch.no_grad()
def run(job: dict) -> dict:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="eager").eval()
    tokens, ids = (next(iter(load_file(job[name]).values())).long() for name in ("tokens", "states"))
    start, cpu = time.perf_counter(), time.process_time()
    program = openvino.convert_model(Body(model), example_input=tokens[:1])
    data = nncf.Dataset(list(tokens.split(1)), lambda row: row.numpy())
    options = nncf.AdvancedQuantizationParameters(**({} if job["smooth"] else {"smooth_quant_alpha": -1}))
    program = nncf.quantize(
        program,
        data,
        subset_size=len(tokens),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False),
        advanced_parameters=options,
    )
    took = {"seconds": round(time.perf_counter() - start, 2), "cpu": round(time.process_time() - cpu, 2)}
    compiled = openvino.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.cat([torch.tensor(compiled(row.numpy())[0]) for row in ids.split(1)])
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({"states": found, "head": model.lm_head.weight.detach().clone()}, out / "states.safetensors")
    return took
