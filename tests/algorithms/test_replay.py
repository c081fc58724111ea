"""AWQ compares its best scales by running the block again: by the block's error, and nothing else is disturbed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import build_model
from wrapq.algorithms.awq import AWQ, AWQOptions, replayed_error
from wrapq.algorithms.replay import Replay
from wrapq.calibration.forward import Batch
from wrapq.calibration.graph import find_graph
from wrapq.calibration.surgery import Surgeon
from wrapq.errors import CalibrationError
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec

SPEC = QuantSpec.parse("int3:channel")


def surgeon_of(family: str, batches: list[Tensor]) -> Surgeon:
    model = build_model(family)
    graph = find_graph(model)
    surgeon = Surgeon(model, graph, smooth_specs(graph, "int3:channel", None))
    surgeon.batches = [Batch({"input_ids": ids, "use_cache": False}) for ids in batches]
    return surgeon


def test_the_error_is_that_of_the_blocks_output(token_batches: list[Tensor]) -> None:
    surgeon = surgeon_of("llama", token_batches)
    feed = surgeon.graph.by_producer["model.layers.1.post_attention_layernorm"]
    factors = torch.rand(64) + 0.5
    found = replayed_error(surgeon, feed, Replay(surgeon, [r.module for r in feed.readers]), factors)

    block, outputs = surgeon.model.model.layers[1], list[Tensor]()
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for turn in range(2):
        for batch in surgeon.batches[:1]:
            surgeon.model(**batch.inputs)
        for name in ("gate_proj", "up_proj") if turn == 0 else ():
            weight = block.mlp.get_submodule(name).weight
            scaled = weight * factors
            weight.copy_(observe_tensor(scaled, SPEC, name).fake_quantize(scaled) / factors)
    handle.remove()
    assert found == pytest.approx(float((outputs[1] - outputs[0]).double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_function_stays_and_blocks_lose_less(family: str, token_batches: list[Tensor]) -> None:
    change, found = outputs_moved(build_model(family), [AWQ(AWQOptions(replay=3, grid=4))], token_batches)
    assert found[0].targets
    assert change < 1e-5
    gains = []
    for target in found[0].targets:
        with_replay, without = (_figures(surgeon_of(family, token_batches), target, replay) for replay in (3, 0))
        assert without["error"] <= with_replay["error"] <= 1
        gains.append(with_replay["block_error"])
    assert max(gains) <= 1 and min(gains) < 0.99


def _figures(surgeon: Surgeon, target: str, replay: int) -> Mapping[str, float]:
    return AWQ(AWQOptions(replay=replay, grid=4)).apply(surgeon, target, _statistics(surgeon, target))


def _statistics(surgeon: Surgeon, producer: str):  # type: ignore[no-untyped-def]
    from wrapq.calibration.gather import Gatherer

    found = {}
    names = [reader.module for reader in surgeon.graph.by_producer[producer].readers]
    Gatherer(surgeon.model, dict.fromkeys(names, frozenset({"hessian", "mean_abs"})), found.update).run(surgeon.batches)
    return found


def test_without_data_it_is_refused(token_batches: list[Tensor]) -> None:
    surgeon = surgeon_of("llama", token_batches)
    surgeon.batches = ()
    with pytest.raises(CalibrationError, match="there is none"):
        Replay(surgeon, ["model.layers.0.mlp.gate_proj"])
