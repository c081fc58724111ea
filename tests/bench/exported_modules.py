"""Models that are no language models, for the table of exports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import wrapq
from tests.bench.export_table import Scheme, batches, costs, rows
from tests.bench.peer_quantizers import Given, Peer, nncf, quantize_static
from tests.real.conftest import find_or_make
from tests.real.test_efficientnet import CONVOLUTIONS, crops
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.export.program import ProgramExporter
from wrapq.export.stopwatch import OUTPUT

PEERS: dict[str, tuple[str, Callable[[bool], Peer]]] = {
    "onnx": ("quantize_static", lambda transformer: quantize_static),
    "openvino": ("NNCF", lambda transformer: nncf(static={"model_type": "transformer"} if transformer else {})),
}
"""By format the peer, for a transformer or else."""
_EXAMPLE, _BATCH = 4, 16


@dataclass(frozen=True)
class Module:
    """A float model.

    Attributes:
        calibration, judged: its inputs by name, [S, ...] each.
        overrides: of the recipe.
        transformer: whether it is one.
        kept: of its first output, what is compared [S, K], and which of several is the likeliest or nearest [S].
    """

    model: nn.Module
    calibration: Mapping[str, Tensor]
    judged: Mapping[str, Tensor]
    overrides: tuple[str, ...]
    transformer: bool
    kept: Callable[[Tensor], tuple[Tensor, Tensor]]


def minilm() -> Module:
    """An encoder, by the mean over tokens, and the nearest neighbour of each."""
    from transformers import AutoModel, AutoTokenizer

    folder = find_or_make("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def words(split: str, count: int) -> dict[str, Tensor]:
        ids = build_samples(make_source("demo", {"split": split}), tokenizer, count, 64, None).input_ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def kept(states: Tensor) -> tuple[Tensor, Tensor]:
        means = nn.functional.normalize(states.mean(1), dim=-1)
        return means, (means @ means.t()).fill_diagonal_(-2).argmax(-1)

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return Module(model, words("calib", 128), words("heldout", 256), (), True, kept)


def efficientnet() -> Module:
    """Convolutions, by the logits, and the class of each image."""
    import efficientnet_lite_pytorch

    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(find_or_make("efficientnet-lite0") / "weights.pth", weights_only=True))
    calibration, judged = crops(24 + 120).split((24, 120))
    given = {"calibration": {"inputs": calibration}, "judged": {"inputs": judged}, "overrides": (CONVOLUTIONS,)}
    return Module(model.eval(), **given, transformer=False, kept=lambda logits: (logits, logits.argmax(-1)))


MODULES = {"MiniLM": minilm, "EfficientNet-Lite0": efficientnet}


def module_rows(target: str, name: str, exporter: ProgramExporter, scratch: Path) -> None:
    """Print the rows of the module called `name`."""
    about = MODULES[name]()
    example = next(batches(about.judged, _EXAMPLE))
    with torch.no_grad():
        outputs = [tree_leaves(about.model(**batch))[0] for batch in batches(about.judged, _BATCH)]
    expected, likeliest = about.kept(torch.cat(outputs))
    wrapq.export_module(about.model, target, scratch / name, example)

    def ours(scheme: Scheme, folder: Path) -> float:
        model, data = copy.deepcopy(about.model), list(batches(about.calibration, _BATCH))
        made = wrapq.quantize(model, scheme.recipe[0], data, [*scheme.recipe[1:], *about.overrides])
        return wrapq.export_module(made, target, folder, example).error

    def judged(folder: Path) -> dict[str, float]:
        answers = [exporter.read_outputs(folder, [*b.values()], "cpu") for b in batches(about.judged, 64)]
        found, nearest = about.kept(torch.cat([answer.logits[f"{OUTPUT}0"] for answer in answers]))
        cosine = float(nn.functional.cosine_similarity(found, expected).mean())
        kept = {"cosine": cosine, "top-1": float((nearest == likeliest).float().mean())}
        return kept | {"MB": exporter.size(folder) / 1e6} | costs(answers[0].measured)

    by, peer = PEERS[target]
    schemes = {"W8A8 static": Scheme(("w8a8_smoothquant",), {by: peer(about.transformer)})}
    rows(target, name, schemes, ours, judged, Given(about.model, scratch / name, Path(), about.calibration, head=""))
