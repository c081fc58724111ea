"""NNCF on OpenVINO models, for `jobs.py`.

A job is a mapping: `model`, the XML of a float model; `data`, a safetensors file with one tensor for each
of its inputs, by name, of which each sample is a row; `out`, the XML to write; `head`, the output whose product stays
float, if any; and either `static`, options of `nncf.quantize`, or `weights`, those of `nncf.compress_weights`, to which
data is given where they ask for it. Keys and values of tokens before are those of no tokens. It takes `seconds`.
"""

import time
from pathlib import Path

import nncf
import numpy as np
import openvino
from safetensors.numpy import load_file

DATA_AWARE = ("awq", "scale_estimation", "gptq")


def samples(model: openvino.Model, data: dict) -> list[dict]:
    """What the model is called with: its inputs, a row each."""
    kept = {each.any_name: each.partial_shape for each in model.inputs if each.any_name not in data}
    empty = {n: np.zeros((1, s[1].get_length(), 0, s[3].get_length()), np.float32) for n, s in kept.items()}
    rows = len(next(iter(data.values())))
    return [{name: tensor[row : row + 1] for name, tensor in data.items()} | empty for row in range(rows)]


def heads(model: openvino.Model, name: str) -> list[str]:
    """The product that makes the output called so."""
    found = [each.get_node() for each in model.outputs if name in each.get_names()]
    while found and found[0].get_type_name() != "MatMul":
        found = [found[0].input_value(0).get_node()]
    return [node.get_friendly_name() for node in found]


def run(job: dict) -> dict:
    model, start = openvino.Core().read_model(job["model"]), time.perf_counter()
    given = samples(model, load_file(job["data"]))
    scope = nncf.IgnoredScope(names=heads(model, job["head"]))
    if "static" in job:
        options = dict(job["static"])
        if kind := options.pop("model_type", None):
            options["model_type"] = nncf.ModelType(kind)
        options |= {"preset": nncf.QuantizationPreset.MIXED, "ignored_scope": scope, "subset_size": len(given)}
        made = nncf.quantize(model, nncf.Dataset(given), **options)
    else:
        options = dict(job["weights"])
        mode = nncf.CompressWeightsMode(options.pop("mode"))
        if any(options.get(name) for name in DATA_AWARE):
            options |= {"dataset": nncf.Dataset(given), "subset_size": len(given)}
        options |= {"ratio": 1.0, "backup_mode": nncf.BackupMode.NONE, "ignored_scope": scope}
        made = nncf.compress_weights(model, mode=mode, **options)
    Path(job["out"]).parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(made, job["out"], compress_to_fp16=False)
    return {"seconds": round(time.perf_counter() - start, 2)}
