"""What an NVIDIA GPU makes of it: the kernels by themselves and in a model, and GPTQ's solve, in one run.

    python -m tests.bench.bench_gpu

1. One linear of 11008 x 4096 in bfloat16 under each kernel that supports it: microseconds of a call, and of its replay
   as a CUDA graph, which leaves out what launching costs.
2. A random-init Llama (hidden 4096, intermediate 11008, 4 layers, 32 heads, 8 key-value heads): milliseconds of a
   prefill of 2048 and 128 tokens and of a decoded token, bytes, and the distance of its logits from bfloat16's in dB.
3. A weight of 4096 x 4096 solved by GPTQ in one launch for each block of columns, and column by column, beside its
   arithmetic at the rate of a matrix product measured here.
4. Stages of a stack on a random-init Llama in bfloat16 (hidden 2048, intermediate 5632, 8 layers, 16 heads, 8 key-value
   heads), W4 group 128, 128 x 1024 tokens: seconds, and forwards over the same tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

import wrapq
from tests.bench.bench_runtime import FLOAT, llama, sqnr
from tests.bench.bench_stages import INPUT, STAGES, WEIGHT
from tests.runtime.sizes import resident_bytes
from wrapq.algorithms import columns as algorithm
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.kernel import KERNELS
from wrapq.statistics.cholesky import factorize

ROWS = (1, 16, 64, 128, 2048)
SCHEMES = {
    "W4A16": {"weight": "int4:g128"},
    "W4A8": {"weight": "int4:g128", "input": "int8:token:dyn"},
    "W8A8": {"weight": "int8:channel", "input": "int8:token:dyn"},
    "W8A16": {"weight": "int8:channel"},
    "FP8_DYNAMIC": {"weight": "fp8_e4m3:channel", "input": "fp8_e4m3:token:dyn"},
    "FP8_BLOCK": {"weight": "fp8_e4m3:b128x128", "input": "fp8_e4m3:g128:dyn"},
}


def microseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The median by the GPU's own clock."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[3:])


def replayed(work: Callable[[], object]) -> float:
    """The same for a replay of `work` as a graph; NaN where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:  # it waits for the GPU in between
        torch.cuda.synchronize()
        return float("nan")
    return microseconds(graph.replay)


def show_linears() -> None:
    inputs = {rows: torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in ROWS}

    def show(name: str, module: nn.Module) -> None:
        # a fresh tensor each time: integers of an input are shared by those that read it
        calls = [lambda x=x: module(x.clone()) for x in inputs.values()]
        print(f"{name:28}" + "".join(f"{microseconds(call):9.0f} /{replayed(call):5.0f}" for call in calls))

    print(f"{'us, called / replayed':28}" + "".join(f"{rows:>15}" for rows in ROWS))
    show("bfloat16", linear())
    for scheme, points in SCHEMES.items():
        module = wrapq.prepare(nn.Sequential(linear()), wrapq.PTQConfig(points["weight"], None, {"0": points}))
        module(inputs[128])
        module = wrapq.convert(module)[0]
        show(f"{scheme} reference", module)
        for name in KERNELS:
            if KERNELS.get(name).unsupported(module) is None:
                module.use_kernel(KERNELS.get(name))
                show(f"{scheme} {name}", module)
                module.use_kernel(None)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4096, 11008, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)


def large() -> nn.Module:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4}
    with torch.device("cuda"):
        return llama(**sizes, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096).bfloat16()


def show_models() -> None:
    ids = torch.randint(0, 4096, (1, 2048), generator=torch.Generator().manual_seed(1)).cuda()
    logits: Tensor | None = None

    def show(name: str, model: nn.Module) -> None:
        nonlocal logits
        y = model(ids[:, :128]).logits.float()
        logits = y if logits is None else logits
        cache = model(ids[:, :128], use_cache=True).past_key_values
        works = (lambda: model(ids), lambda: model(ids[:, :128]), lambda: model(ids[:, 128:129], past_key_values=cache))
        times = "".join(f"{microseconds(work, 5) / 1e3:10.2f}" for work in works)
        print(f"{name:28}{times}{resident_bytes(model) / 1e6:10.0f}{sqnr(logits, y):10.2f}")

    print(f"{'':28}" + "".join(f"{title:>10}" for title in ("ms, 2048", "128", "decode", "MB", "dB")))
    show("bfloat16", large())
    for scheme, points in SCHEMES.items():
        model = wrapq.prepare(large(), wrapq.PTQConfig(points["weight"], None, {**FLOAT, "*_proj": points}))
        model(ids[:, :64])
        model = wrapq.convert(model)
        show(f"{scheme} reference", model)
        counts = choose_kernels(model, "auto").counts()
        show(f"{scheme} {' '.join(counts)}", model)
        del model
        torch.cuda.empty_cache()


def show_solve(rows: int = 4096, columns: int = 4096) -> None:
    x = torch.randn(2 * columns, columns, device="cuda") * torch.rand(columns, device="cuda")
    weight, hessian = torch.randn(rows, columns, device="cuda"), x.t() @ x
    factor, spec = factorize(hessian, 0.01, True), QuantSpec.parse("int4:g128")
    ranges = observe_tensor(weight, spec, "w")
    rate = 2 * rows * columns**2 / microseconds(lambda: weight @ hessian)
    solve = lambda: algorithm.gptq(weight, [ranges], factor)  # noqa: E731
    times = {"factorize": microseconds(lambda: factorize(hessian, 0.01, True), 5), "solve": microseconds(solve, 5)}
    with patch.object(algorithm, "_in_one_launch", lambda *_: None):
        times["by column"] = microseconds(solve, 2)
    times["floor"] = 2 * rows * columns**2 / 2 / rate
    print("GPTQ, ms: " + ", ".join(f"{name} {time / 1e3:.1f}" for name, time in times.items()))


def show_stages() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}

    def small() -> nn.Module:
        with torch.device("cuda"):
            return llama(**sizes, num_key_value_heads=8, max_position_embeddings=2048).bfloat16()

    def seconds(work: Callable[..., object], *args: object) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work(*args)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    model, tokens = small(), torch.randint(3, 4096, (128, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    batches = list(tokens.split(8))
    model(batches[0], use_cache=False)
    forward = sum(seconds(partial(model, use_cache=False), ids) for ids in batches)
    print(f"{'one forward':28}{forward:8.2f} s")
    # the first is measured twice, as it compiles what all share
    for name in ("gptq", "gptq", "seqmse", "awq", "smoothquant", "fold_norms, rotate R1 R2"):
        points = {"weight": WEIGHT} | ({"input": INPUT} if "smooth" in name else {})
        prepared = wrapq.prepare(small(), wrapq.PTQConfig(WEIGHT, None, {**FLOAT, "*_proj": points}))
        taken = seconds(wrapq.calibrate, prepared, batches, STAGES[name])
        print(f"{name:28}{taken:8.2f} s{taken / forward:8.2f} forwards", flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    with torch.no_grad():
        show_linears()
        show_models()
        show_solve()
        show_stages()
