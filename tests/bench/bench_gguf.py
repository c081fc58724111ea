"""The same types in llama.cpp, by wrapq and by the rounding of the package gguf: what they keep, what they cost there.

    python -m tests.bench.bench_gguf [--model FOLDER] [--samples 64]

The shipped model, or a checkpoint; judged on 16 x 128 held-out tokens against the float model in llama.cpp. What one
quantizes, the other does: the layers, and neither the head nor the embedding.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.bench.bench_onnx import asked, row
from tests.exports import export_of
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.evaluation.quality import QualityMeter
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
}


def rounded(path: Path, floating: Path, out: Path) -> Path:
    """A copy of a file with its quantized tensors rounded anew by the package gguf, from the floats of another file."""
    shutil.copy(path, out)
    floats = {tensor.name: tensor.data for tensor in gguf.GGUFReader(floating).tensors}
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            tensor.data[:] = gguf.quants.quantize(np.array(floats[tensor.name]), tensor.tensor_type)
    return out


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
        write_gguf(source.load(torch.device("cpu")), tokenizer, floating, "float", torch.float32)
        reference, _ = logits(floating, evaluated)
        print(json.dumps({"by": "float"} | measured(floating, reference, evaluated)), flush=True)
        for kind, (recipe, *changes) in RUNS.items():
            calibrated = [f"calibration.samples={samples}"] if recipe == "gguf_q4_0" else []
            run = wrapq.run(recipe, [*words, *more, *changes, *calibrated, f"paths.outputs={scratch}/{kind}"])
            ours = export_of(run).path / MODEL
            theirs = rounded(ours, floating, Path(scratch, "theirs.gguf"))
            for by, path in {"wrapq": ours, "gguf": theirs}.items():
                print(json.dumps({"type": kind, "by": by} | measured(path, reference, evaluated)), flush=True)


if __name__ == "__main__":
    main()
