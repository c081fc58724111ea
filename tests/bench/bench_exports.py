"""Every runtime that wrapq exports to: the same bits by wrapq and by that runtime's own quantizers, beside float there.

    WRAPQ_REAL_MODELS=FOLDER python -m tests.bench.bench_exports [--only onnx,openvino] [--samples 64] [--model FOLDER]

One table in Markdown, a row as soon as it is measured. Language models, the shipped one or a checkpoint, are calibrated
on the same tokens by both sides, 64 x 256 of them, and judged on 16 x 128 held-out ones against the float model in
torch; an encoder and convolutions, which `tests/real` makes, by cosine and by nearest neighbours or classes. `error` is
how far an export is from the converted model that it was made of, relative to the norm. Times are those of one run, and
mean something on a machine that does nothing else. What this environment has no packages for is left out and said; NNCF
has an environment of its own, which `WRAPQ_PEER_PYTHON` names or which is made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

import wrapq
from tests.bench import peer_quantizers as peers
from tests.bench.export_table import Scheme, costs, head, rows
from tests.bench.exported_modules import MODULES, PEERS, module_rows
from tests.bench.peer_quantizers import Given, Peer
from tests.exports import export_of
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.evaluation.quality import QualityMeter
from wrapq.export.base import Exporter, make_exporter
from wrapq.export.gguf.ggml_types import NEAREST
from wrapq.export.gguf.writer import write_gguf
from wrapq.export.program import ProgramExporter
from wrapq.export.run_gguf import MODEL as GGUF
from wrapq.recipe.compose import compose
from wrapq.recipe.schema import Export
from wrapq.resolve.model_source import ModelSource
from wrapq.runs.folder import RunFolder

WINDOWS, LENGTH, CALIBRATED = 16, 128, 256

GGML = {"ggml": peers.ggml(False), "ggml, importance": peers.ggml(True)}


def compressed(mode: str) -> dict[str, Peer]:
    """NNCF's groups of 128, to nearest and by its algorithms that look at data."""
    options = {"mode": mode, "group_size": 128}
    aware = {"AWQ, scales": ["awq", "scale_estimation"], "GPTQ, scales": ["gptq", "scale_estimation"]}
    found = {"NNCF": peers.nncf(weights=options)}
    return found | {f"NNCF, {n}": peers.nncf(weights=options | dict.fromkeys(a, True)) for n, a in aware.items()}


def q(kind: str, more: str = "") -> Scheme:
    return Scheme(("gguf_q4_0", f"rules.linear.weight='{NEAREST.get(kind, kind)}{more}'"), GGML)


SCHEMES: dict[str, dict[str, Scheme]] = {
    "onnx": {
        "W4 g128": Scheme(("onnx_w4a16",), {"MatMulNBitsQuantizer": peers.matmul_nbits}),
        "W8A8 static": Scheme(("onnx_w8a8",), {"quantize_static": peers.quantize_static}),
    },
    "openvino": {
        "W4 g128": Scheme(("openvino_w4a16",), compressed("int4_sym")),
        "W4 g128 asym": Scheme(("openvino_w4a16", "rules.linear.weight=int4:g128:asym"), compressed("int4_asym")),
        "W8A8 static": Scheme(("openvino_w8a8",), {"NNCF": peers.nncf(static={"model_type": "transformer"})}),
    },
    "executorch": {
        "W8A8 static": Scheme(("executorch_w8a8",), {"PT2E, XNNPACKQuantizer": peers.pt2e()}),
        "W8A8 dynamic": Scheme(
            ("executorch_w4a8", "rules.linear.weight=int8:channel"),
            {
                "PT2E, XNNPACKQuantizer": peers.pt2e(is_dynamic=True),
                "torchao": peers.torchao(8),
            },
        ),
        "W4A8 g32": Scheme(
            ("executorch_w4a8",),
            {"torchao": peers.torchao(4, 32), "torchao, HQQ": peers.torchao(4, 32, "hqq_scale_only")},
        ),
    },
    "circle": {
        "W8A16": Scheme(("circle_int16",), {"TICO": peers.tico(8), "TICO, GPTQ": peers.tico(8, gptq=True)}),
        "W4A16": Scheme(
            ("circle_w4a16",),
            {"TICO": peers.tico(4), "TICO, GPTQ": peers.tico(4, gptq=True)},
        ),
    },
    "gguf": {
        "q4_0": Scheme(("gguf_q4_0",), GGML),
        "q4_1": q("q4_1"),
        "q5_0": q("q5_0", ":signed"),
        "mxfp4": q("mxfp4"),
        "q8_0": Scheme(("gguf_q8_0",), GGML, calibrated=False),
        "q4_k": Scheme(("gguf_q4_k",), GGML),
        "q4_k to nearest": Scheme(("gguf_q4_k", "algorithm@stack.round=least_squares"), GGML),
        "q5_k": Scheme(("gguf_q4_k", "rules.linear.weight=q5_k"), GGML),
        "q6_k": Scheme(("gguf_q4_k", "rules.linear.weight=q6_k"), GGML),
    },
}  # fmt: skip
"""By the format and the name of the scheme; the head of a language model stays float but in circle and gguf."""


def language_model(target: str, exporter: Exporter, words: Sequence[str], samples: int, scratch: Path) -> None:
    """The rows of a language model."""
    schemes = SCHEMES[target]
    source = ModelSource(compose([f"recipe={next(iter(schemes.values())).recipe[0]}", *words]).recipe.model)
    tokenizer, model = source.tokenizer(), source.load(torch.device("cpu")).float()
    data = {s: make_source("demo", {"split": s}) for s in ("calib", "heldout")}
    calibration = build_samples(data["calib"], tokenizer, samples, CALIBRATED, 0).input_ids
    evaluated = build_samples(data["heldout"], tokenizer, WINDOWS, LENGTH, None).input_ids
    reference, floating = model(evaluated).logits, scratch / "float"
    floating.mkdir()
    tokenizer.save_pretrained(floating)
    if isinstance(exporter, ProgramExporter):
        exporter.write(model, RunFolder(floating))
    else:
        write_gguf(model, tokenizer, floating / GGUF, "float", torch.float32)

    def ours(scheme: Scheme, folder: Path) -> float:
        more = ["tracking=none", "runtime.kernels=reference", "evaluation.tokens=512", f"export={target}"]
        more += [f"export.{target}.beside_float=false", f"paths.outputs={folder} run"]
        if scheme.calibrated:
            more += [f"calibration.samples={samples}", f"calibration.seq_len={CALIBRATED}", "calibration.seed=0"]
        made = export_of(wrapq.run(scheme.recipe[0], [*words, *scheme.recipe[1:], *more]))
        folder.symlink_to(made.path)
        return made.error

    def judged(folder: Path) -> dict[str, float]:
        reading, meter = exporter.read(folder, evaluated, "cpu"), QualityMeter()
        meter.update(reference, reading.logits, evaluated)
        quality = meter.result()
        found = {"KL, nats": quality["kl"], "top-1": quality["top1_agreement"], "MB": exporter.size(folder) / 1e6}
        return found | costs(reading.measured)

    masks = {} if target in ("executorch", "circle", "gguf") else {"attention_mask": torch.ones_like(calibration)}
    name = Path(words[0]).name if words else "demo"
    rows(target, name, schemes, ours, judged, Given(model, floating, Path(), {"input_ids": calibration, **masks}))


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default=",".join(SCHEMES))
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--model", default="")
    chosen = options.parse_args()
    disable_progress_bar()
    words = [f"model.path={chosen.model}", "model=hf"] if chosen.model else []
    head()
    for target in chosen.only.split(","):
        exporter = make_exporter(target, Export())
        if missing := [*exporter.missing_packages()]:
            print(f"{target} is left out: {missing[0].what}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            language_model(target, exporter, words, chosen.samples, Path(scratch))
            for name in MODULES if target in PEERS else ():
                module_rows(target, name, exporter, Path(scratch))


if __name__ == "__main__":
    main()
