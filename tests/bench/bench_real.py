"""What recipes keep of Gemma 3 270M, beside llm-compressor and NNCF on the same tokens; and what calibration costs.

    python -m tests.bench.bench_real CALIBRATION.txt EVALUATION.txt [--seeds 3] [--only W4] [--rows FILE] [--speed 3]

For each scheme and method: KL(float || quantized) in nats, the mean over 8 x 512 tokens, and how often the likeliest
token is the same; mean and standard deviation over the seeds, each of which draws other 32 x 256 tokens of the text to
calibrate on. wrapq runs as the command line does; the peers get its token ids, which begin with BOS, and run in their
own environment (`tests.peers.environment`). Their models are judged by `QualityMeter`, from what their bodies compute
and the weights of their heads, which nobody quantizes. wrapq and llm-compressor compute in the checkpoint's bfloat16,
NNCF and the model that it is compared with in float32. Rows are appended to FILE as they come, and what it holds is not
measured again. The checkpoint is that of `WRAPQ_REAL_MODELS`, or made as `tests/real` does.

`--speed N`: no quality, but CPU seconds of N alternating pairs of W4 g128 GPTQ: wrapq's step `calibrate`, `oneshot`;
and the floor of one forward, measured, with a triangle of the Hessian of each distinct input and the solves, at the
rate of a large float32 product. For this the machine has to be quiet; `OMP_NUM_THREADS` sets the threads of all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from tests.bench.bench_gptq import cpu_seconds, matrix_rate
from tests.peers.environment import NNCF, ONESHOT, STATIC, peer_python, run_oneshots
from tests.real.conftest import find_or_make
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.engine.progress import Progress
from wrapq.engine.run import run
from wrapq.evaluation.quality import QualityMeter
from wrapq.large_pages import use_large_pages

SAMPLES, LENGTH, EVALUATED, WINDOW, BATCH = 32, 256, 4096, 512, 8
ROTATE = (
    "+algorithm@stack.fold=fold_norms",
    "stack.fold.untie=true",
    "+algorithm@stack.rotate=rotate",
    "stack.rotate.rotations=[R1,R2,R4]",
)
SMOOTH = "+algorithm@stack.smooth=smoothquant"
WRAPQ: dict[tuple[str, str], Sequence[str]] = {
    ("W4 g128 GPTQ", "wrapq"): ["recipe=w4a16_gptq"],
    ("W4 g128 GPTQ", "wrapq, by gradients"): ["recipe=w4a16_gptq_gradient"],
    ("W4 g128 GPTQ", "wrapq, rotated"): ["recipe=w4a16_rotated_gptq"],
    ("W4 g128 AWQ", "wrapq"): ["recipe=w4a16_awq"],
    ("W3 g128 GPTQ", "wrapq"): ["recipe=w3a16_gptq"],
    ("W3 g128 GPTQ", "wrapq, by gradients"): ["recipe=w3a16_gptq", "stack.round.gradient=true"],
    ("W3 g128 GPTQ", "wrapq, rotated"): [
        "recipe=w4a16_rotated_gptq",
        "scheme@rules.linear=w3a16",
        "stack.round.asymmetric=1",
        "stack.round.sweeps=0",
    ],
    ("W8A8 dynamic", "wrapq"): ["recipe=w8a8_dynamic"],
    ("W8A8 dynamic", "wrapq, smoothed"): ["recipe=w8a8_dynamic", SMOOTH, "stack.smooth.feeds=all"],
    ("W8A8 dynamic", "wrapq, rotated"): ["recipe=w8a8_dynamic", *ROTATE],
    ("W8A8 static", "wrapq"): ["recipe=w8a8_static"],
    ("W8A8 static", "wrapq, smoothed at each forward"): ["recipe=w8a8_smoothquant"],
    ("W8A8 static", "wrapq, rotated"): ["recipe=w8a8_static_rotated"],
    ("W8A8 static", "wrapq, rotated, first token float"): ["recipe=w8a8_static_rotated", "float_prefix=1"],
    ("W4A8 KV4", "wrapq, rotated"): ["recipe=w4a8_kv4_rotated"],
    ("W4A4", "wrapq, rotated"): ["recipe=w4a4_rotated_gptq"],
    ("W4A4", "wrapq, rotated, inputs in groups"): [
        "recipe=w4a4_rotated_gptq",
        "scheme@rules.linear=w4a4_g128",
        "stack.rotate.block=128",
    ],
}
"""The overrides of a run, for each scheme and method."""
STRENGTH = {"smoothing_strength": 0.8}
MAPPINGS = [
    [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"],
    [["re:.*gate_proj$", "re:.*up_proj$"], "re:.*pre_feedforward_layernorm$"],
]
"""Which norm feeds which layers; llm-compressor has for Gemma 3 what holds for Llama, and smooths the wrong norm."""


def _quantize(modifier: str, scheme: str) -> dict[str, Any]:
    return {modifier: {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}}


def _spin(*rotations: str) -> dict[str, Any]:
    return {"SpinQuantModifier": {"rotations": rotations, "transform_type": "random-hadamard"}}


LLMC: dict[tuple[str, str], Mapping[str, Any]] = {
    ("W4 g128 GPTQ", "llm-compressor"): _quantize("GPTQModifier", "W4A16"),
    ("W4 g128 AWQ", "llm-compressor"): {"AWQModifier": {}, **_quantize("QuantizationModifier", "W4A16")},
    ("W4 g128 AWQ", "llm-compressor, asymmetric"): {
        "AWQModifier": {},
        **_quantize("QuantizationModifier", "W4A16_ASYM"),
    },
    ("W3 g128 GPTQ", "llm-compressor"): _quantize("GPTQModifier", "W3A16"),
    ("W8A8 dynamic", "llm-compressor"): _quantize("QuantizationModifier", "W8A8"),
    ("W8A8 dynamic", "llm-compressor, GPTQ"): _quantize("GPTQModifier", "W8A8"),
    ("W8A8 dynamic", "llm-compressor, SmoothQuant and GPTQ"): {
        "SmoothQuantModifier": STRENGTH,
        **_quantize("GPTQModifier", "W8A8"),
    },
    ("W8A8 dynamic", "llm-compressor, SmoothQuant of the right norms and GPTQ"): {
        "SmoothQuantModifier": STRENGTH | {"mappings": MAPPINGS},
        **_quantize("GPTQModifier", "W8A8"),
    },
    ("W4A4", "llm-compressor"): _quantize("GPTQModifier", "W4A4"),
    ("W4A4", "llm-compressor, SpinQuant R1 to R4"): {
        **_spin("R1", "R2", "R3", "R4"),
        **_quantize("GPTQModifier", "W4A4"),
    },
    ("W4A4", "llm-compressor, SpinQuant R2 and R4"): {**_spin("R2", "R4"), **_quantize("GPTQModifier", "W4A4")},
}
"""The modifiers of a recipe, likewise."""
STATICS = {("W8A8 static", "NNCF"): False, ("W8A8 static", "NNCF, SmoothQuant"): True}
"""Whether NNCF uses SmoothQuant, likewise."""
WITHOUT_DATA = [("W8A8 dynamic", "wrapq"), ("W8A8 dynamic", "wrapq, rotated"), ("W8A8 dynamic", "llm-compressor")]
"""What is the same for each seed."""


class Texts:
    """The checkpoint, and what it is calibrated and judged on."""

    def __init__(self, calibration: Path, evaluation: Path) -> None:
        self.model = find_or_make("gemma3-270m")
        self.paths = {"calibration": calibration.resolve(), "evaluation": evaluation.resolve()}
        self.evaluated = self._ids("evaluation", EVALUATED // WINDOW, WINDOW, None)

    def calibration(self, seed: int) -> Tensor:
        return self._ids("calibration", SAMPLES, LENGTH, seed)

    def _ids(self, name: str, count: int, length: int, seed: int | None) -> Tensor:
        source = make_source("text", {"path": str(self.paths[name])})
        return build_samples(source, AutoTokenizer.from_pretrained(self.model), count, length, seed).input_ids

    def overrides(self, outputs: Path, seed: int | None) -> list[str]:
        """By which a run of wrapq has the same tokens; those to calibrate on, unless `seed` is None."""
        words = ["tracking=none", "model=hf", f"model.path={self.model}", f"paths.outputs={outputs}"]
        for name, path in list(self.paths.items())[seed is None :]:
            words += [f"{name}=text", f"{name}.path={path}"]
        if seed is not None:
            words += [f"calibration.samples={SAMPLES}", f"calibration.seq_len={LENGTH}", f"calibration.seed={seed}"]
            words += [f"calibration.batch_size={BATCH}"]
        return [*words, f"evaluation.tokens={EVALUATED}", f"evaluation.seq_len={WINDOW}"]

    def load(self, dtype: torch.dtype) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()


class Judge:
    """Compares what other programs computed with what the float model does.

    Attributes:
        found: of the float model, by dtype: what its body gives for each window [T, K], and the weight of its head.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.found: dict[torch.dtype, tuple[list[Tensor], Tensor]] = {}

    def __call__(self, states: Tensor, head: Tensor) -> dict[str, float]:
        if states.dtype not in self.found:
            model = self.texts.load(states.dtype)
            bodies = [model.model(ids[None], use_cache=False).last_hidden_state[0] for ids in self.texts.evaluated]
            self.found[states.dtype] = bodies, model.lm_head.weight
        bodies, weight = self.found[states.dtype]
        meter = QualityMeter()
        for ids, body, other in zip(self.texts.evaluated, bodies, states, strict=True):
            meter.update((body @ weight.T)[None], (other @ head.T)[None], ids[None])
        return meter.result()


def ours(texts: Texts, key: tuple[str, str], seed: int, folder: Path) -> dict[str, Any]:
    """What a run of wrapq measures; a model that collapsed has figures too."""
    start = time.perf_counter()
    overrides = texts.overrides(folder, None if key in WITHOUT_DATA else seed)
    command = [sys.executable, "-m", "wrapq", "run", *WRAPQ[key], *overrides]
    with (folder / "said").open("w+") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        _, _, usage = os.wait4(process.pid, 0)
    facts = [json.loads(path.read_text()) for path in folder.glob("*/*/run.json")]
    if not facts or "quantized" not in facts[0].get("stages", {}):
        return {"error": (folder / "said").read_text()[-2000:]}
    measured = {"seconds": round(time.perf_counter() - start, 1), "gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}
    return measured | facts[0]["stages"]["quantized"]


def theirs(texts: Texts, judge: Judge, key: tuple[str, str], seed: int, folder: Path, python: Path) -> dict[str, Any]:
    files = {"tokens": texts.calibration(seed), "states": texts.evaluated}
    for name, ids in files.items():
        save_file({"ids": ids.contiguous()}, folder / f"{name}.safetensors")
    job: dict[str, Any] = {name: str(folder / f"{name}.safetensors") for name in files}
    job |= {"model": str(texts.model), "out": str(folder / "out")}
    job |= {"smooth": STATICS[key]} if key in STATICS else oneshot_job(LLMC[key])
    try:
        (answer,) = run_oneshots(python, [job], folder, STATIC if key in STATICS else ONESHOT)
    except RuntimeError as error:
        return {"error": str(error)}
    return answer if "error" in answer else answer | judge(**load_file(folder / "out" / "states.safetensors"))


def oneshot_job(modifiers: Mapping[str, Any]) -> dict[str, Any]:
    """With two modifiers each needs a pass of its own: in one, GPTQ sees inputs from before they were smoothed."""
    recipe = json.dumps({"s_stage": {"m_modifiers": modifiers}})
    pipeline = "independent" if len(modifiers) > 1 else "sequential"
    return {"recipe": recipe, "dtype": "bfloat16", "batch_size": BATCH, "pipeline": pipeline}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each scheme the methods."""
    lines = ["| scheme | by | n | KL | sd | top-1 | seconds |", "|---|---|---|---|---|---|---|"]
    for key in (*WRAPQ, *LLMC, *STATICS):
        found = [row for row in rows if (row["scheme"], row["by"]) == key and "kl" in row]
        failed = any((row["scheme"], row["by"]) == key for row in rows)
        if not found:
            lines += [f"| {' | '.join(key)} | 0 | failed | | | |"] * failed
            continue
        kl, top1, seconds = ([row[name] for row in found] for name in ("kl", "top1_agreement", "seconds"))
        spread = statistics.stdev(kl) if len(kl) > 1 else 0.0
        figures = f"{statistics.mean(kl):.4f} | {spread:.4f} | {statistics.mean(top1):.3f}"
        lines.append(f"| {' | '.join(key)} | {len(found)} | {figures} | {statistics.mean(seconds):.0f} |")
    head, body = lines[:2], lines[2:]
    order = list(dict.fromkeys(scheme for scheme, _ in WRAPQ))
    return "\n".join([*head, *sorted(body, key=lambda line: order.index(line.split(" | ")[0].removeprefix("| ")))])


class StepClock(Progress):
    """CPU seconds of each task of a run, by its title."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[], None]]:
        start = time.process_time()
        yield lambda: None
        self.seconds[title] = time.process_time() - start


def floor(model: nn.Module, tokens: Tensor, rate: float) -> dict[str, float]:
    """CPU seconds of the least that calibration by GPTQ does, in three parts.

    M tokens, N outputs, K inputs: `M K^2` for the lower triangle of the Hessian of each distinct input, `K^3` to factor
    and invert it, `N K^2` to hand the errors of the columns to those after them.
    """
    inputs: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    model.model(tokens[:1], use_cache=False)
    for hook in hooks:
        hook.remove()
    distinct = {id(x): x.shape[-1] for x in inputs.values()}.values()
    products = sum(layer.out_features * layer.in_features**2 for layer in layers.values())
    forward = cpu_seconds(lambda: [model.model(part, use_cache=False) for part in tokens.split(BATCH)])
    return {
        "forward": forward,
        "hessians": sum(tokens.numel() * width**2 for width in distinct) / rate,
        "solves": (sum(width**3 for width in distinct) + products) / rate,
    }


def speed(texts: Texts, pairs: int, python: Path, folder: Path) -> None:
    """Print CPU seconds of both and the floor, and their ratios, for each pair."""
    tokens = texts.calibration(0)
    save_file({"ids": tokens.contiguous()}, folder / "tokens.safetensors")
    files = {"tokens": str(folder / "tokens.safetensors"), "states": str(folder / "tokens.safetensors")}
    job = oneshot_job(LLMC["W4 g128 GPTQ", "llm-compressor"]) | files | {"model": str(texts.model)}
    for number in range(pairs):
        clock, outputs = StepClock(), folder / f"ours-{number}"
        load, rates = os.getloadavg()[0], [matrix_rate()]
        run("w4a16_gptq", [*texts.overrides(outputs, 0), f"evaluation.tokens={WINDOW}"], clock)
        rates.append(matrix_rate())
        least = floor(texts.load(torch.bfloat16), tokens, statistics.mean(rates))
        (answer,) = run_oneshots(python, [job | {"out": str(folder / f"theirs-{number}")}], folder)
        seconds = clock.seconds["Calibrating"]
        row = {"wrapq": round(seconds, 2), "llm-compressor": answer["cpu"], "ratio": round(seconds / answer["cpu"], 3)}
        row |= {"floor": {name: round(value, 2) for name, value in least.items()}}
        row |= {"to_floor": round(seconds / sum(least.values()), 2), "gflops": [round(rate / 1e9) for rate in rates]}
        print(json.dumps(row | {"threads": torch.get_num_threads(), "load": round(load, 2)}), flush=True)


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("calibration", type=Path)
    options.add_argument("evaluation", type=Path)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", default="", help="of which schemes and methods: those that contain this")
    options.add_argument("--rows", type=Path)
    options.add_argument("--speed", type=int, default=0)
    given = options.parse_args()
    disable_progress_bar()
    texts = Texts(given.calibration, given.evaluation)
    wanted = [key for key in (*WRAPQ, *LLMC, *STATICS) if given.only in f"{key[0]}, {key[1]}"]
    with tempfile.TemporaryDirectory() as scratch:
        asks_peers = given.speed or any(key not in WRAPQ for key in wanted)
        python = peer_python(Path(scratch, "peer"), NNCF) if asks_peers else Path()
        if given.speed:
            return speed(texts, given.speed, python, Path(scratch))
        path, judge = given.rows or Path(scratch, "rows.jsonl"), Judge(texts)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for seed in range(given.seeds):
            for key in wanted:
                row = {"scheme": key[0], "by": key[1], "seed": seed}
                same = [known for known in rows if (known["scheme"], known["by"]) == key]
                failed = any("error" in known for known in same)
                if seed in [known["seed"] for known in same] or failed or (seed and key in WITHOUT_DATA):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    if key in WRAPQ:
                        row |= ours(texts, key, seed, Path(folder))
                    else:
                        row |= theirs(texts, judge, key, seed, Path(folder), python)
                rows.append(row)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table(rows))
    return None


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
