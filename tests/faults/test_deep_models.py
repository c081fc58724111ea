"""The cost of a plan is bounded by what is looked at: linear in the layers, and more than any model has is refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import forked
from tests.models import DEMO
from wrapq.graph.dataflow import find_graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 20000}, "asks for num_hidden_layers 20000; wrapq takes 1024"),
        ({"num_hidden_layers": 10**9}, "asks for num_hidden_layers 1000000000; wrapq takes 1024"),
        ({"model_type": "gpt2", "n_layer": 5000, "num_hidden_layers": None}, "asks for n_layer 5000; wrapq takes 1024"),
        ({"model_type": "mixtral", "num_local_experts": 10**6}, "asks for num_local_experts 1000000; wrapq takes 1024"),
    ],
    ids=["layers", "a billion of them", "by another name", "experts"],
)
@pytest.mark.parametrize("recipe", ["w4a16_gptq", "w8a8_smoothquant"])
def test_a_mistyped_count_is_refused(change: dict[str, Any], message: str, recipe: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    whole = json.loads((model / "config.json").read_text()) | change
    config = {key: value for key, value in whole.items() if value is not None}
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    done = forked.wrapq(["plan", f"recipe={recipe}", f"model.path={model}"], tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert time.monotonic() - start < 60


def _seconds(layers: int) -> float:
    config = AutoConfig.from_pretrained(DEMO, num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    start = time.process_time()
    assert len(find_graph(model).streams) >= 1
    return time.process_time() - start


@pytest.mark.slow
def test_the_graph_is_found_in_linear_time() -> None:
    _seconds(4)
    few = _seconds(16)
    assert min(_seconds(64) for _ in range(2)) < 7 * few
