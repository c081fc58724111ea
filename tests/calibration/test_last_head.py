"""The logits of a large vocabulary are observed in parts, as if they were there at once; nothing runs after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.calibration.conftest import decided, gptq_walker
from tests.conftest import VOCABULARY, build_model
from wrapq import PTQConfig, prepare
from wrapq.calibration import last_head
from wrapq.graph.blocks import Batch

TOKENS = 12


def batches(masked: bool) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(VOCABULARY, (2, TOKENS), generator=generator) for _ in range(3)]
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 7:] = False
    if not masked:
        return [Batch({"input_ids": each, "use_cache": False}) for each in ids]
    return [Batch({"input_ids": each, "attention_mask": mask, "use_cache": False}, mask) for each in ids]


def walked(family: str, spec: str, schedule: str, masked: bool) -> tuple[dict[str, str], list[int]]:
    """What was decided, and how many positions each call of the whole head had."""
    model = prepare(build_model(family), PTQConfig("int8:channel:sym", activations=spec))
    seen: list[int] = []
    whole = nn.Linear.forward
    head = model.lm_head
    model_walker = gptq_walker(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Linear,
            "forward",
            lambda self, x: seen.append(x.shape[-2]) or whole(self, x) if self is head else whole(self, x),
        )
        model_walker.run(batches(masked), schedule)
    return decided(model), seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize(
    ("family", "spec"),
    [("gemma3", "int16:tensor:sym"), ("qwen3", "uint8:tensor:asym:percentile")],
)
def test_parts_of_the_logits_decide_what_all_at_once_do(
    family: str, spec: str, schedule: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = walked(family, spec, schedule, masked)
    assert whole == [TOKENS] * 3
    monkeypatch.setattr(last_head, "_ELEMENTS", 5 * VOCABULARY)
    got, parts = walked(family, spec, schedule, masked)
    assert got == expected and parts == []


def test_an_observer_that_counts_its_batches_sees_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_head, "_ELEMENTS", 5 * VOCABULARY)
    assert walked("qwen3", "uint8:tensor:asym:ema", "sequential", False)[1] == [TOKENS] * 3
