"""Statistics of the float model, block by block, the blocks changed on the way."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.conftest import build_model
from wrapq.calibration.float_pass import collect_statistics
from wrapq.engine.apply_transforms import checked, outputs
from wrapq.errors import ModelError
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.statistics.input import InputStatistics

NEEDS = frozenset({"hessian"})


def expected_hessians(model: torch.nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def add(module: object, args: tuple[Tensor], name: str = name) -> None:
            rows = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + rows.t() @ rows

        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    for ids in batches:
        model(ids)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_each_block_is_handed_out_once_with_what_hooks_would_see(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    graph = find_graph(model)
    names = list(graph.consumers)
    expected = expected_hessians(model, names, token_batches)
    rewriter, groups, got = GraphRewriter(model, graph), [], {}

    def done(gathered: Mapping[str, InputStatistics]) -> None:
        groups.append(sorted(gathered))
        got.update({name: statistic.get("hessian", name).clone() for name, statistic in gathered.items()})
        for edge in (edge for edge in graph.edges if set(gathered) & set(edge.modules[1:])):
            if edge.layer.kind == "linear" and edge.fully_owned:  # what comes after must not notice
                rewriter.scale(edge, torch.full((edge.width,), 2.0))

    collect_statistics(model, [Batch({"input_ids": ids}) for ids in token_batches], dict.fromkeys(names, NEEDS), done)
    assert [len(group) for group in groups] == [len(names) // 2, len(names) // 2, 1]
    for name in names:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-3)


def test_modules_with_one_input_share_its_statistic(token_batches: list[Tensor]) -> None:
    seen: dict[str, InputStatistics] = {}
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    batches = [Batch({"input_ids": ids}) for ids in token_batches]
    collect_statistics(build_model("llama"), batches, dict.fromkeys(names, NEEDS), seen.update)
    q, k, v, o = (seen[name] for name in names)
    assert q is k is v
    assert o is not q
    assert q.rows == sum(ids.numel() for ids in token_batches)


def test_what_changes_the_function_is_undone_and_refused(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    rewriter, batch = GraphRewriter(model, find_graph(model)), Batch({"input_ids": token_batches[0]})
    before = outputs(model, batch)
    with (
        pytest.raises(ModelError, match="bad changed the function of the float model"),
        checked(rewriter, batch, "bad"),
    ):
        rewriter._writable("model.layers.0.mlp.down_proj", "weight").mul_(1.01)
    assert torch.equal(outputs(model, batch), before)
    with pytest.raises(ZeroDivisionError), checked(rewriter, batch, "dies"):
        rewriter._writable("model.layers.0.mlp.down_proj", "weight").mul_(1 / 0)
    assert torch.equal(outputs(model, batch), before)
