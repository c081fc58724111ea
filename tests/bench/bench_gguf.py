"""The same types in llama.cpp, by wrapq and by ggml's own rounding: what they keep, what they cost there.

    python -m tests.bench.bench_gguf [--model FOLDER] [--samples 64]

The shipped model, or a checkpoint; judged on 16 x 128 held-out tokens against the float model in llama.cpp. What one
quantizes, the other does. ggml rounds with and without an importance matrix, of the calibration tokens that wrapq has.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.bench.bench_onnx import asked, row
from tests.export.ggml_rounding import rounded_by_ggml
from tests.exports import export_of
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.evaluation.quality import QualityMeter
from wrapq.export.gguf.architectures import ARCHITECTURES
from wrapq.export.gguf.ggml_types import NEAREST
from wrapq.export.gguf.writer import write_gguf
from wrapq.export.run_gguf import MODEL
from wrapq.recipe.compose import compose
from wrapq.resolve.model_source import ModelSource

WINDOWS, LENGTH = 16, 128
RUNS = {
    "q4_0": ["gguf_q4_0"],
    "q4_1": ["gguf_q4_0", f"rules.linear.weight='{NEAREST['q4_1']}'"],
    "q5_0": ["gguf_q4_0", f"rules.linear.weight='{NEAREST['q5_0']}:signed'"],
    "mxfp4": ["gguf_q4_0", "rules.linear.weight=mxfp4"],
    "q8_0": ["gguf_q8_0"],
    "q4_k": ["gguf_q4_k"],
    "q4_k to nearest": ["gguf_q4_k", "algorithm@stack.round=least_squares"],
    "q5_k": ["gguf_q4_k", "rules.linear.weight=q5_k"],
    "q6_k": ["gguf_q4_k", "rules.linear.weight=q6_k"],
}


def rounded(path: Path, floating: Path, out: Path, importances: Mapping[str, Tensor]) -> Path:
    """A copy of a file with its quantized tensors rounded anew by ggml, from the floats of another file."""
    shutil.copy(path, out)
    floats = {tensor.name: tensor.data for tensor in gguf.GGUFReader(floating).tensors}
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            weight = torch.from_numpy(np.array(floats[tensor.name]))
            tensor.data[:] = rounded_by_ggml(weight, tensor.tensor_type.name, importances.get(tensor.name))
    return out


def importances_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The mean square of each input of the linear layers over tokens [B, T], by llama.cpp's names of their weights."""
    architecture, sums = ARCHITECTURES[type(model).__name__], dict[str, Tensor]()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], model.config.num_hidden_layers)

    def add(name: str, inputs: tuple[Tensor]) -> None:
        power = inputs[0].float().square().flatten(0, -2).mean(0) / len(ids)
        sums[name] = sums.get(name, 0) + power

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            known = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            module.register_forward_pre_hook(lambda _, inputs, name=known: add(name, inputs))
    for sequence in ids:
        model(sequence[None])
    return sums


def logits(path: Path, ids: Tensor) -> tuple[list[Tensor], float]:
    """Those of each sequence, and how long one took, in ms."""
    threads = torch.get_num_threads()
    model: Any = llama_cpp.Llama(
        str(path), n_ctx=LENGTH, logits_all=True, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    found, times = [], []
    for sequence in ids:
        start = time.perf_counter()
        model.reset()
        model.eval(sequence.tolist())
        times.append(1000 * (time.perf_counter() - start))
        found.append(torch.from_numpy(model.scores[:LENGTH].copy()))
    model.close()
    return found, sorted(times)[len(times) // 2]


def measured(path: Path, reference: list[Tensor], ids: Tensor) -> dict[str, float]:
    """What a model keeps of the float one, its size, and its time for 128 tokens."""
    meter, (found, ms) = QualityMeter(), logits(path, ids)
    for theirs, ours, sequence in zip(reference, found, ids, strict=True):
        meter.update(theirs[None], ours[None], sequence[None])
    return row(meter, path.stat().st_size / 1e6, ms)


@torch.no_grad()
def main() -> None:
    words, samples = asked(__doc__)
    disable_progress_bar()
    more = ["tracking=none", "runtime.kernels=reference", "evaluation.tokens=512", "export=gguf"]
    source = ModelSource(compose(["recipe=gguf_q4_0", *words]).recipe.model)
    tokenizer = source.tokenizer()
    evaluated = build_samples(make_source("demo", {"split": "heldout"}), tokenizer, WINDOWS, LENGTH, None).input_ids
    with tempfile.TemporaryDirectory() as scratch:
        floating = Path(scratch, "float.gguf")
        model = source.load(torch.device("cpu"))
        write_gguf(model, tokenizer, floating, "float", torch.float32)
        text = make_source("demo", {"split": "calib"})
        importances = importances_of(model, build_samples(text, tokenizer, samples, LENGTH, None).input_ids)
        reference, _ = logits(floating, evaluated)
        print(json.dumps({"by": "float"} | measured(floating, reference, evaluated)), flush=True)
        for kind, (recipe, *changes) in RUNS.items():
            calibrated = [f"calibration.samples={samples}"] if recipe != "gguf_q8_0" else []
            run = wrapq.run(recipe, [*words, *more, *changes, *calibrated, f"paths.outputs={scratch}/{kind}"])
            ours = export_of(run).path / MODEL
            paths = {"wrapq": ours}
            for by, known in {"ggml": {}, "ggml, importance": importances}.items():
                paths[by] = rounded(ours, floating, Path(scratch, f"{by}.gguf"), known)
            for by, path in paths.items():
                print(json.dumps({"type": kind, "by": by} | measured(path, reference, evaluated)), flush=True)


if __name__ == "__main__":
    main()
