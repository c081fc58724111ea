"""How much of a small model wrapq's weight rounding loses, beside llm-compressor's: same tokens, one evaluator.

    python -m tests.bench.bench_accuracy [--models demo,PATH] [--seeds 3] [--methods gptq,llmc-gptq] [--rows FILE]
        [--bits "W2 g64,W3 g64"]

For each model, bits and method: KL(float || quantized) in nats, mean over the predicted tokens, the perplexity, the
seconds of the quantization alone, and the error of a decoder layer by itself; mean and standard deviation over seeds,
each of which draws other calibration text.
Weights only; embeddings, norms and lm_head stay float. 128 x 256 calibration tokens, 16,384 tokens to evaluate on, from
other text. Damping is 0.01 for both. Every method gives dense float32 weights, and all of them are judged by the same
forwards. The peer runs in its own environment (`tests.peers.environment`). Rows are appended to FILE as they come, and
what it already holds is not measured again.

The default models are the one that ships and, where it is, `../shared/models/tiny-llama-docs` with its text in
`../shared/data`. llm-compressor's activation order "group" is no variant: compressed-tensors 0.19 refuses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.models import DEMO
from tests.peers.environment import peer_python, run_oneshots
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.evaluation.quality import QualityMeter
from wrapq.runtime.module import QuantizedWeight

SAMPLES, LENGTH, EVALUATED, BATCH, DAMP = 128, 256, 16384, 8, 0.01
SHARED = Path(wrapq.__file__).parents[2] / "shared"
BITS = {
    "W4 channel": ("int4:channel:sym", {"num_bits": 4, "strategy": "channel"}),
    "W3 g64": ("int3:g64:sym", {"num_bits": 3, "strategy": "group", "group_size": 64}),
    "W2 g64": ("int2:g64:sym", {"num_bits": 2, "strategy": "group", "group_size": 64}),
    "W2 channel": ("int2:channel:sym", {"num_bits": 2, "strategy": "channel"}),
}
OURS: dict[str, tuple[str, dict[str, Any], str]] = {  # algorithm, its options, the rest of the weight's spec
    "rtn": ("rtn", {}, "minmax"),
    "rtn-mse": ("rtn", {}, "mse"),
    "seqmse": ("seqmse", {}, "minmax"),
    "gptq": ("gptq", {"damp": DAMP}, "minmax"),
    "gptq-asymmetric": ("gptq", {"damp": DAMP, "asymmetric": 1.0}, "minmax"),
    "gptq-observer": ("gptq", {"damp": DAMP, "ranges": "observer"}, "minmax"),
    "gptq-mse": ("gptq", {"damp": DAMP, "ranges": "observer"}, "mse"),
    "gptq-hessian": ("gptq", {"damp": DAMP, "ranges": "hessian"}, "minmax"),
    "gptq-signed": ("gptq", {"damp": DAMP}, "signed"),
    "gptq-both": ("gptq", {"damp": DAMP, "asymmetric": 1.0}, "signed"),
    "hqq": ("hqq", {}, "minmax"),
    "adaround": ("adaround", {}, "mse"),
    "autoround": ("autoround", {}, "minmax"),
    "autoround-mse": ("autoround", {}, "mse"),
    "autoround-signed": ("autoround", {}, "signed"),
    "awq": ("rtn", {}, "minmax"),
    "awq-replay": ("rtn", {}, "minmax"),
    "awq-seqmse": ("seqmse", {}, "minmax"),
}
BEFORE = {"awq": {"scale": "awq"}, "awq-replay": {"scale": {"algorithm": "awq", "replay": 5}}}
BEFORE |= {"awq-seqmse": BEFORE["awq"]}
FLOATS = {"lm_head": None, "*embed_tokens": None, "*norm": None}
MSE = {"observer": "memoryless_mse"}
PEER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # modifier, its options, the weights' arguments
    "llmc-rtn": ("QuantizationModifier", {}, {}),
    "llmc-rtn-mse": ("QuantizationModifier", {}, MSE),
    "llmc-gptq": ("GPTQModifier", {"dampening_frac": DAMP}, {}),  # its default order is "static"
    "llmc-gptq-unordered": ("GPTQModifier", {"dampening_frac": DAMP, "actorder": None}, {}),
    "llmc-gptq-mse": ("GPTQModifier", {"dampening_frac": DAMP}, MSE),
    "llmc-autoround": ("AutoRoundModifier", {"enable_torch_compile": False}, {}),
    "llmc-awq": ("QuantizationModifier", {}, {}),
}
FLOAT = "float"
WITHOUT_DATA = ("rtn", "rtn-mse", "hqq", "llmc-rtn", "llmc-rtn-mse")
SLOW = ("llmc-autoround", "adaround", "autoround", "autoround-mse", "awq", "awq-replay", "awq-seqmse", "llmc-awq")
"""Measured only when `--methods` names them."""


Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A model with its text."""

    name: str
    folder: Path
    calibration: Any
    evaluation: Any

    def tokens(self, source: Any, samples: int, seed: int | None) -> Tensor:
        return build_samples(source, AutoTokenizer.from_pretrained(self.folder), samples, LENGTH, seed).input_ids

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()


def case(name: str) -> Case:
    if name == "demo":
        return Case(name, DEMO, make_source("demo", {"split": "calib"}), make_source("demo", {"split": "heldout"}))
    texts = (make_source("text", {"path": str(SHARED / "data" / f"{part}.txt")}) for part in ("calib", "test"))
    return Case(Path(name).name, Path(name), *texts)


class Judge:
    """The evaluator of all methods: a float model, its logits, and a place to put quantized weights into."""

    def __init__(self, case: Case) -> None:
        self.ids = case.tokens(case.evaluation, EVALUATED // LENGTH, None).split(BATCH)
        self.model = case.load()
        self.float = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.reference = [self.model(input_ids=ids, use_cache=False).logits for ids in self.ids]
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        with self._hooked(lambda i, hidden: self.inputs.append(hidden), lambda i, out: self.outputs.append(out)):
            self.model(input_ids=self.ids[0], use_cache=False)

    @contextmanager
    def _hooked(self, enter: Callable[[int, Tensor], Any], leave: Callable[[int, Tensor], Any]) -> Iterator[None]:
        """`enter` sees what comes into each decoder layer and may give it something else; `leave` what comes out."""
        hooks = []
        for i, layer in enumerate(self.model.model.layers):
            replaced = lambda _, args, i=i: None if (x := enter(i, args[0])) is None else (x, *args[1:])  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(replaced))
            hooks.append(layer.register_forward_hook(lambda _, args, out, i=i: leave(i, out)))
        yield
        for hook in hooks:
            hook.remove()

    def layer_error(self) -> float:
        """The squared error of a decoder layer's output, relative to the output, on the float model's input; the mean
        over the layers."""
        errors = []

        def compare(i: int, out: Tensor) -> None:
            errors.append(((out - self.outputs[i]).square().sum() / self.outputs[i].square().sum()).item())

        with self._hooked(lambda i, _: self.inputs[i], compare):
            self.model(input_ids=self.ids[0], use_cache=False)
        return statistics.mean(errors)

    def judge(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """The quality with `weights` in place of the float ones; raises `KeyError` where one is none of the model's."""
        self.model.load_state_dict({name: weights.get(name, value) for name, value in self.float.items()})
        if unknown := set(weights) - set(self.float):
            raise KeyError(sorted(unknown)[0])
        meter = QualityMeter()
        for ids, reference in zip(self.ids, self.reference, strict=True):
            meter.update(reference, self.model(input_ids=ids, use_cache=False).logits, ids)
        found = meter.result()
        return {"kl": found["kl"], "perplexity": found["perplexity"], "layer": self.layer_error()}


def round_weights(case: Case, bits: str, method: str, ids: Tensor) -> tuple[dict[str, Tensor], float]:
    """wrapq's rounded weights by name, and the seconds it took."""
    algorithm, options, rest = OURS[method]
    config = wrapq.PTQConfig(f"{BITS[bits][0]}:{rest}", None, FLOATS)
    model = wrapq.prepare(case.load(), config)
    start = time.perf_counter()
    batches = [{"input_ids": part, "use_cache": False} for part in ids.split(BATCH)]
    wrapq.calibrate(model, batches, {**BEFORE.get(method, {}), "round": {"algorithm": algorithm, **options}})
    seconds = time.perf_counter() - start
    model = wrapq.convert(model)
    rounded = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    return {name: value for name, value in model.named_parameters() if name.endswith("norm.weight")} | rounded, seconds


def peer_job(case: Case, bits: str, method: str, tokens: Path, out: Path) -> dict[str, Any]:
    modifier, options, arguments = PEER[method]
    weights = {"type": "int", "symmetric": True, "dynamic": False, **BITS[bits][1], **arguments}
    group = {"targets": ["Linear"], "weights": weights}
    before = {"AWQModifier": {}} if method == "llmc-awq" else {}
    rounding = {modifier: {"ignore": ["lm_head"], "config_groups": {"group_0": group}, **options}}
    stage = {"m_modifiers": before | rounding}
    job = {"model": str(case.folder), "dtype": "float32", "recipe": json.dumps({"s_stage": stage}), "dense": True}
    return job | {"out": str(out), "batch_size": BATCH} | ({} if method in WITHOUT_DATA else {"tokens": str(tokens)})


def measure(
    case: Case, seed: int, wanted: list[tuple[str, str]], python: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each (bits, method) in `wanted`."""
    judge, ids = Judge(case), case.tokens(case.calibration, SAMPLES, seed)
    row = {"model": case.name, "seed": seed}
    for bits, method in wanted:
        if method == FLOAT:
            yield row | {"bits": bits, "method": method, "seconds": 0.0} | judge.judge({})
        if method in OURS:
            weights, seconds = round_weights(case, bits, method, ids)
            yield row | {"bits": bits, "method": method, "seconds": seconds} | judge.judge(weights)
    tokens = folder / "tokens.safetensors"
    save_file({"ids": ids.contiguous()}, tokens)
    asked = {str(folder / f"{b} {m}"): (b, m) for b, m in wanted if m in PEER}
    if not asked:
        return
    jobs = [peer_job(case, *what, tokens, Path(out)) for out, what in asked.items()]
    for answer in run_oneshots(python, jobs, folder):
        bits, method = asked[answer["out"]]
        if "error" in answer:
            yield row | {"bits": bits, "method": method, "error": answer["error"]}
            continue
        weights = load_file(Path(answer["out"]) / "model.safetensors")
        yield row | {"bits": bits, "method": method, "seconds": answer["seconds"]} | judge.judge(weights)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each model and bits the methods with mean and standard deviation over the seeds."""
    lines = [
        "| model | bits | method | n | KL | sd | perplexity | sd | seconds | layer error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["model"], row["bits"], row["method"]) for row in rows if "kl" in row)
    order = [FLOAT, *BITS], [FLOAT, *OURS, *PEER]
    for key in sorted(keys, key=lambda k: (k[0], order[0].index(k[1]), order[1].index(k[2]))):
        found = [row for row in rows if (row["model"], row["bits"], row["method"]) == key and "kl" in row]
        kl, perplexity, seconds = ([row[name] for row in found] for name in ("kl", "perplexity", "seconds"))
        spread = [statistics.stdev(values) if len(found) > 1 else 0.0 for values in (kl, perplexity)]
        lines.append(
            f"| {' | '.join(key)} | {len(found)} | {statistics.mean(kl):.5f} | {spread[0]:.5f} "
            f"| {statistics.mean(perplexity):.3f} | {spread[1]:.3f} | {statistics.mean(seconds):.1f} "
            f"| {statistics.mean(row.get('layer', float('nan')) for row in found):.3g} |"
        )
    return "\n".join(lines)


def parser(description: str | None) -> argparse.ArgumentParser:
    """What the benchmarks on these models and texts take."""
    tiny = SHARED / "models" / "tiny-llama-docs"
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=",".join(["demo", *([str(tiny)] if tiny.is_dir() else [])]))
    made.add_argument("--seeds", type=int, default=3)
    return made


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", default=",".join(m for m in (*OURS, *PEER) if m not in SLOW))
    options.add_argument("--bits", default=",".join(BITS))
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rows", type=Path)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    disable_progress_bar()
    methods = given.methods.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        path = given.rows or Path(scratch, "rows.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        python = peer_python(Path(scratch, "peer")) if set(methods) & set(PEER) else Path()
        for seed in range(given.seeds):
            for name in given.models.split(","):
                known = {(r["bits"], r["method"]) for r in rows if r["model"] == case(name).name and r["seed"] == seed}
                pairs = [(b, m) for b in given.bits.split(",") for m in methods if not (seed and m in WITHOUT_DATA)]
                pairs += [] if seed else [(FLOAT, FLOAT)]
                wanted = [pair for pair in pairs if pair not in known]
                folder = Path(scratch, f"{case(name).name}-{seed}")
                folder.mkdir()
                for row in measure(case(name), seed, wanted, python, folder) if wanted else ():
                    rows.append(row)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
