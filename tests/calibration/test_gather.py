"""Statistics of the float model, block by block, the blocks changed on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import build_model
from wrapq.calibration.forward import Batch
from wrapq.calibration.gather import Gathered, Gatherer
from wrapq.calibration.graph import find_graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.engine.transform import checked, outputs
from wrapq.errors import ModelError

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
    names = list(graph.by_reader)
    expected = expected_hessians(model, names, token_batches)
    surgeon, groups, got = Surgeon(model, graph), [], {}

    def done(gathered: Gathered) -> None:
        groups.append(sorted(gathered))
        got.update({name: statistic.get("hessian", name).clone() for name, statistic in gathered.items()})
        for feed in {feed.producer: feed for name in gathered for feed in graph.by_reader[name]}.values():
            if feed.leaf.kind == "linear" and feed.closed:  # what comes after must not notice
                surgeon.scale(feed, torch.full((len(feed.channels),), 2.0))

    Gatherer(model, dict.fromkeys(names, NEEDS), done).run([Batch({"input_ids": ids}) for ids in token_batches])
    assert [len(group) for group in groups] == [len(names) // 2, len(names) // 2, 1]
    for name in names:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-3)


def test_modules_with_one_input_share_its_statistic(token_batches: list[Tensor]) -> None:
    seen: dict[str, InputStatistics] = {}
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    gatherer = Gatherer(build_model("llama"), dict.fromkeys(names, NEEDS), seen.update)
    gatherer.run([Batch({"input_ids": ids}) for ids in token_batches])
    q, k, v, o = (seen[name] for name in names)
    assert q is k is v
    assert o is not q
    assert q.rows == sum(ids.numel() for ids in token_batches)


def test_what_changes_the_function_is_undone_and_refused(token_batches: list[Tensor]) -> None:
    model = build_model("llama")
    surgeon, batch = Surgeon(model, find_graph(model)), Batch({"input_ids": token_batches[0]})
    before = outputs(model, batch)
    with pytest.raises(ModelError, match="bad changed the function of the float model"), checked(surgeon, batch, "bad"):
        surgeon._edit("model.layers.0.mlp.down_proj", "weight").mul_(1.01)
    assert torch.equal(outputs(model, batch), before)
    with pytest.raises(ZeroDivisionError), checked(surgeon, batch, "dies"):
        surgeon._edit("model.layers.0.mlp.down_proj", "weight").mul_(1 / 0)
    assert torch.equal(outputs(model, batch), before)
