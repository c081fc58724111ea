"""Small runs in processes of their own, to be disturbed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import yaml

from tests import forked
from tests.models import random_model
from wrapq.runs.folder import unseal

RECIPE = "w4a16_gptq"
SMALL = ("evaluation.tokens=1024", "calibration.samples=8", "calibration.batch_size=4", "tracking=none")
_STATIC = ("rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges")


def arguments(outputs: Path, *more: str) -> list[str]:
    """A run that takes a few seconds, with points of both kinds."""
    return ["run", *more, f"recipe={RECIPE}", *_STATIC, *SMALL, f"paths.outputs={outputs}"]


def start(outputs: Path, *more: str) -> BaseProcess:
    """A run that goes on beside the test."""
    outputs.mkdir(parents=True, exist_ok=True)
    return forked.start(arguments(outputs, *more), Path.cwd(), [outputs / "said", outputs / "errors"])


def finish(outputs: Path, *more: str) -> CompletedProcess[str]:
    """A run that has ended."""
    return forked.wrapq(arguments(outputs, *more))


def wait(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until `condition` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def got_past(outputs: Path, block: int) -> Callable[[], bool]:
    """Whether each of the runs under `outputs`, of which there is one, could be taken up after its `block`th block."""

    def reached(folder: Path) -> bool:
        try:
            return json.loads(unseal((folder / "resume" / "state.json").read_text()))["index"] >= block
        except FileNotFoundError:
            return False

    return lambda: (folders := list(outputs.glob(f"{RECIPE}/*/"))) != [] and all(map(reached, folders))


def digests(outputs: Path) -> list[dict[str, str]]:
    """The digests of parameters and outputs of the finished runs."""
    locks = sorted(outputs.glob("*/*/recipe.lock.yaml"))
    found = [yaml.safe_load(lock.read_text())["digests"] for lock in locks]
    return [{key: each[key] for key in ("qparams", "tensors", "outputs")} for each in found]


_TINY = "source: demo\nseq_len: 16\nbatch_size: 2\n"
_SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
_OWN = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "gemma2": {"query_pre_attn_scalar": 8}}
_OWN |= {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}}


def tiny_model(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A checkpoint of `family` as small as can be, but for `changes`."""
    return random_model(family, folder, hidden_size=16, **{**_SIZES, **_OWN.get(family, {}), **changes})


def tiny(presets: Path) -> list[str]:
    """Words for a run that takes half a second with a tiny model; the few tokens are presets, which lie in `presets`
    then, because no recipe takes overrides of calibration that nothing reads."""
    for group, few in (("calibration", "samples: 2\n"), ("evaluation", "split: heldout\ntokens: 32\n")):
        (presets / "conf" / group).mkdir(parents=True, exist_ok=True)
        (presets / "conf" / group / "tiny.yaml").write_text(f"# Few tokens.\n{_TINY}{few}")
    words = [
        "--config-dir",
        str(presets),
        "calibration=tiny",
        "evaluation=tiny",
        "rules.linear.weight=int8:channel:sym",
    ]
    return [*words, "runtime.kernels=reference", "tracking=none"]
