"""AWQ compares its best scales by running the block again: by the block's error, and nothing else is disturbed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import build_model
from wrapq.algorithms.awq import AWQ, AWQOptions, block_error
from wrapq.algorithms.block_outputs import BlockOutputs
from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.observers.base import observe_tensor
from wrapq.quant.spec import QuantSpec

SPEC = QuantSpec.parse("int3:channel")


def rewriter_of(family: str, batches: list[Tensor]) -> GraphRewriter:
    model = build_model(family)
    graph = find_graph(model)
    rewriter = GraphRewriter(model, graph, smooth_specs(graph, "int3:channel", None))
    rewriter.batches = [Batch({"input_ids": ids, "use_cache": False}) for ids in batches]
    return rewriter


def test_the_error_is_that_of_the_blocks_output(token_batches: list[Tensor]) -> None:
    rewriter = rewriter_of("llama", token_batches)
    edge = rewriter.graph.by_producer["model.layers.1.post_attention_layernorm"]
    factors = torch.rand(64) + 0.5
    found = block_error(rewriter, edge, BlockOutputs(rewriter, [r.module for r in edge.consumers]), factors)

    block, outputs = rewriter.model.model.layers[1], list[Tensor]()
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for turn in range(2):
        for batch in rewriter.batches[:1]:
            rewriter.model(**batch.inputs)
        for name in ("gate_proj", "up_proj") if turn == 0 else ():
            weight = block.mlp.get_submodule(name).weight
            scaled = weight * factors
            weight.copy_(observe_tensor(scaled, SPEC, name).fake_quantize(scaled) / factors)
    handle.remove()
    assert found == pytest.approx(float((outputs[1] - outputs[0]).double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_function_stays_and_blocks_lose_less(family: str, token_batches: list[Tensor]) -> None:
    change, found = outputs_moved(build_model(family), [AWQ(AWQOptions(replay=3, grid=4))], token_batches)
    assert found[0].names
    assert change < 1e-5
    gains = []
    for target in found[0].names:
        with_replay, without = (_figures(rewriter_of(family, token_batches), target, replay) for replay in (3, 0))
        assert without["error"] <= with_replay["error"] <= 1
        gains.append(with_replay["block_error"])
    assert max(gains) <= 1 and min(gains) < 0.99


def _figures(rewriter: GraphRewriter, target: str, replay: int) -> Mapping[str, float]:
    return AWQ(AWQOptions(replay=replay, grid=4)).apply(rewriter, target, _statistics(rewriter, target))


def _statistics(rewriter: GraphRewriter, producer: str):  # type: ignore[no-untyped-def]
    from wrapq.calibration.float_pass import collect_statistics

    found = {}
    names = [consumer.module for consumer in rewriter.graph.by_producer[producer].consumers]
    needs = dict.fromkeys(names, frozenset({"hessian", "mean_abs"}))
    collect_statistics(rewriter.model, rewriter.batches, needs, found.update)
    return found


def test_without_data_it_is_refused(token_batches: list[Tensor]) -> None:
    rewriter = rewriter_of("llama", token_batches)
    rewriter.batches = ()
    with pytest.raises(CalibrationError, match="there is none"):
        BlockOutputs(rewriter, ["model.layers.0.mlp.gate_proj"])
