"""How fast and how large a small Llama is, float and converted, as ratios measured in one run.

python -m tests.bench.bench_runtime                            prints the table
pytest -m bench -n 0 tests/bench/bench_runtime.py              prints it and checks the targets
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import wrapq
from tests.runtime.sizes import resident_bytes, weight_bytes
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.module import QuantizedWeight

PROMPT, ROUNDS, DECODED = 128, 8, 8
SCHEMES = {"W8A8": ("int8:channel", "int8:token:dyn"), "W8A8 static": ("int8:channel", "int8:tensor")}
SCHEMES |= {"W8A16": ("int8:channel", None), "W4A8": ("int4:g128", "int8:token:dyn")}
SCHEMES |= {"W4A16": ("int4:g128", None), "W4A16 asym": ("uint4:g128:asym", None)}
FLOAT = {"lm_head": None, "*embed_tokens": None, "*norm": None}
KERNELS = {"W8A8": ("int8_mm", "int8_onednn", "auto"), "W8A16": ("int8_weight",)}


@dataclass
class Row:
    """One model: seconds of it and of float32 beside it, bytes, and how far its logits are from float32's, in dB."""

    name: str
    file: int
    ideal: int
    sqnr: float
    resident: int
    prefill: float = float("inf")
    decode: float = float("inf")
    float_prefill: float = float("inf")
    float_decode: float = float("inf")

    @property
    def speeds(self) -> tuple[float, float]:
        """How many times faster than float32 prefill and decode are."""
        return self.float_prefill / self.prefill, self.float_decode / self.decode


SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def llama(**changes: int) -> nn.Module:
    """A random-init Llama of `SIZES`, but for `changes`."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval().requires_grad_(False)


def prepare(points: dict[str, str], ids: Tensor) -> nn.Module:
    model = wrapq.prepare(llama(), wrapq.PTQConfig(points["weight"], None, {**FLOAT, "*_proj": points}))
    model(ids)
    return model


def fake(points: dict[str, str], ids: Tensor) -> nn.Module:
    """The model as it is just before conversion: float tensors, rounded at each forward."""
    from wrapq.algorithms.base import ALGORITHMS
    from wrapq.calibration.assignments import Assignments
    from wrapq.calibration.walker import Walker
    from wrapq.wrappers.model import iter_quantizers
    from wrapq.wrappers.quantizer import WeightQuantizer

    model = prepare(points, ids)
    rounders = {q.where: ALGORITHMS.get("rtn")() for q in iter_quantizers(model) if isinstance(q, WeightQuantizer)}
    ranges = {q.where: ALGORITHMS.get("ranges")() for q in iter_quantizers(model) if q.where not in rounders}
    Walker(model, Assignments(rounders, ranges)).run([], "parallel")
    return model


def models(ids: Tensor) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Every model by name, as a function that makes it; only the layers' projections are quantized."""

    def on(points: dict[str, str], kernel: str | None) -> nn.Module:
        model = wrapq.convert(prepare(points, ids))
        if kernel:
            choose_kernels(model, kernel)
        return model

    yield "bfloat16", lambda: llama().bfloat16()
    for scheme, (weight, activation) in SCHEMES.items():
        points = {"weight": weight} | ({"input": activation} if activation else {})
        if scheme in ("W8A8", "W8A8 static", "W4A16"):
            yield f"{scheme} fake-quantized", lambda points=points: fake(points, ids)
        for kernel in (None, *KERNELS.get(scheme.split()[0], ("int4_cpu",))):
            yield f"{scheme} {kernel or 'reference'}", lambda points=points, kernel=kernel: on(points, kernel)


@torch.no_grad()
def measure(threads: int = 1) -> list[Row]:
    """One model at a time, in turn with float32, so that what else the machine does meets both."""
    torch.set_num_threads(threads)
    ids = torch.randint(0, 4096, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    base = llama()
    logits = base(ids).logits
    size = file_bytes(base)
    rows = [Row("float32", size, size, float("inf"), resident_bytes(base))]
    for name, make in models(ids):
        model = make()
        row = Row(name, file_bytes(model), ideal_bytes(model), sqnr(logits, model(ids).logits), resident_bytes(model))
        for _ in range(ROUNDS):
            row.float_prefill = min(row.float_prefill, seconds(lambda: base(ids)))
            row.prefill = min(row.prefill, seconds(lambda model=model: model(ids)))
            row.float_decode = min(row.float_decode, decode_seconds(base, ids))
            row.decode = min(row.decode, decode_seconds(model, ids))
        rows.append(row)
    rows[0].prefill = rows[0].float_prefill = min(row.float_prefill for row in rows)
    rows[0].decode = rows[0].float_decode = min(row.float_decode for row in rows)
    return rows


def decode_seconds(model: nn.Module, ids: Tensor) -> float:
    """The shortest forward of a single token behind the prompt."""
    cache = model(ids[:, :32], use_cache=True).past_key_values
    return min(seconds(lambda i=i: model(ids[:, i : i + 1], past_key_values=cache)) for i in range(32, 32 + DECODED))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sqnr(y: Tensor, other: Tensor) -> float:
    noise = (y - other.float()).norm()
    return float("inf") if noise == 0 else (20 * torch.log10(y.norm() / noise)).item()


def file_bytes(model: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({name: t.clone().contiguous() for name, t in model.state_dict().items()}, path)
        return path.stat().st_size


def ideal_bytes(model: nn.Module) -> float:
    """Float tensors as they are, quantized weights at their bits, scales and zero points at theirs."""
    weights = {f"{name}.weight_" for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    state = model.state_dict()
    kept = sum(t.nbytes for name, t in state.items() if not any(name.startswith(start) for start in weights))
    modules = (module for module in model.modules() if isinstance(module, QuantizedWeight))
    return kept + sum(weight_bytes(module.matrix_shape, module.specs["weight"]) for module in modules)


def table(rows: list[Row]) -> str:
    base = rows[0]
    lines = [f"{'':28}{'prefill':>9}{'decode':>9}{'resident':>10}{'/ideal':>8}{'file':>8}{'/ideal':>8}{'dB':>8}"]
    for row in rows:
        speed = "".join(f"{part:8.2f}x" for part in row.speeds)
        resident = f"{row.resident / base.resident:10.3f}{row.resident / row.ideal:8.3f}"
        file = f"{row.file / base.file:8.3f}{row.file / row.ideal:8.3f}"
        lines.append(f"{row.name:28}{speed}{resident}{file}{row.sqnr:8.2f}")
    times = f"float32: prefill {base.prefill * 1e3:.1f} ms, decode {base.decode * 1e3:.1f} ms, {base.file / 1e6:.1f} MB"
    return "\n".join([times, *lines])


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_targets() -> None:
    rows = {row.name: row for row in measure()}
    sys.stdout.write(table(list(rows.values())) + "\n")
    prefill, decode = rows["W8A8 auto"].speeds
    assert prefill >= 2.5 and decode >= 1.8
    prefill, decode = rows["W4A16 int4_cpu"].speeds
    assert prefill >= 0.9 and decode >= 2.5
    for scheme, kernel in (("W8A8", "auto"), ("W8A8 static", "auto"), ("W4A16", "int4_cpu")):
        assert rows[f"{scheme} {kernel}"].sqnr == pytest.approx(rows[f"{scheme} fake-quantized"].sqnr, abs=0.1)


if __name__ == "__main__":
    sys.stdout.write(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1)) + "\n")
