"""Rotations at each forward: the function stays, points see what is turned, and it lasts through saving and kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.algorithms.transforming import outputs_moved, smooth_specs
from tests.conftest import KINDS, build_model
from tests.graph.test_dataflow import weightless
from tests.resolve.conftest import MakePlan, make_plan, refusal  # noqa: F401
from wrapq import PTQConfig, calibrate, convert, load, prepare
from wrapq.algorithms.rotate import Rotate, RotateOptions
from wrapq.errors import ModelError
from wrapq.graph.dataflow import find_graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.quant.hadamard import factors, hadamard
from wrapq.quant.spec import QuantSpec
from wrapq.runs.checkpoint import save_model
from wrapq.runs.folder import RunFolder
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.rotation import OnlineRotation
from wrapq.statistics.transport import transform_hessian
from wrapq.wrappers.attention import Attention
from wrapq.wrappers.model import iter_wrapped

DOWN = "model.layers.1.mlp.down_proj"
LINEAR = "l: {match: {type: Linear}, weight: int8:channel}\nhead: {match: {name: lm_head}, quantize: false}"
TAIL = "round: {algorithm: rtn}"
KEYS = {"key": QuantSpec.parse("int4:token:dyn"), "value": QuantSpec.parse("int4:token:dyn")}


def online(*names: str, **options: object) -> Rotate:
    return Rotate(RotateOptions(rotations=names, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "kind"), [(1408, "hadamard"), (96, "hadamard"), (92, "hadamard"), (30, "orthogonal")]
)
def test_it_is_the_dense_orthogonal_matrix(width: int, kind: str) -> None:
    turn = OnlineRotation.make(width, kind, 3)  # type: ignore[arg-type]
    dense = turn(torch.eye(width, dtype=torch.double))
    torch.testing.assert_close(dense @ dense.t(), torch.eye(width, dtype=torch.double), rtol=0, atol=1e-6)
    if (found := factors(width)) is not None:
        assert found[0].shape[0] * found[1].shape[0] == width
        expected = turn.signs[:, None] * torch.kron(*found) / width**0.5
        torch.testing.assert_close(dense, expected, rtol=0, atol=1e-12)
    x = torch.randn(2, 3, width)
    torch.testing.assert_close(turn(x), (x.double() @ dense).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(OnlineRotation.make(width, kind, 3)(x), turn(x))  # type: ignore[arg-type]
    half = OnlineRotation.make(width, kind, 3).to(torch.bfloat16)  # type: ignore[arg-type]
    torch.testing.assert_close(half(x.bfloat16()).float(), turn(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("block", "width", "size"),
    [(128, 640, 128), (128, 576, 96), (None, 640, 640), (16, 10, 10), (128, 254, 127), (128, 257, 257), (64, 48, 48)],
)
def test_blocks_divide_the_width(block: int | None, width: int, size: int) -> None:
    assert online("R4", block=block)._size(width) == size


def test_factors_are_the_cheapest() -> None:
    assert [len(f) for f in factors(1408) or ()] == [32, 44]
    assert factors(92) is None and hadamard(92) is None


@pytest.mark.parametrize("family", (*KINDS, "gemma3"))
def test_the_function_stays_when_all_inputs_are_turned(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    change, (found,) = outputs_moved(model, [online("R4")], token_batches)
    assert 1e-9 < change < 1e-5
    assert len(found.names) == 2  # what neither a norm nor attention gives: the second linear of each block's MLP
    assert all(target.endswith(".input") for target in found.names)


def test_mixtral_says_why_there_is_nothing() -> None:
    graph = find_graph(weightless("mixtral"))
    assert online("R4").find_targets(graph, smooth_specs(graph)).names == ()


@pytest.mark.parametrize("options", [{}, {"block": 16}, {"matrix": "orthogonal"}], ids=str)
def test_points_see_turned_inputs_and_hessians_go_along(
    options: dict[str, object], token_batches: list[Tensor]
) -> None:
    model, seen = build_model("llama"), list[Tensor]()
    rewriter = GraphRewriter(model, find_graph(model), {DOWN: {}})
    before = model(token_batches[0]).logits
    down = model.get_submodule(DOWN)
    weight = down.weight.clone()
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 96).double()))
    model(token_batches[0])
    handle.remove()
    assert online("R4", **options).apply(rewriter, f"{DOWN}.input", {})
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 96).double()))
    torch.testing.assert_close(model(token_batches[0]).logits, before, rtol=1e-4, atol=1e-4)
    assert float((seen[1] - seen[0]).norm() / seen[0].norm()) > 0.5
    assert not torch.allclose(down.weight, weight)
    carried = transform_hessian(seen[0].t() @ seen[0], rewriter.input_changes[DOWN])
    torch.testing.assert_close(carried, seen[1].t() @ seen[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_can_be_undone(family: str, token_batches: list[Tensor]) -> None:
    model = build_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rewriter = GraphRewriter(model, find_graph(model), smooth_specs(find_graph(model)))
    rotate = Rotate(RotateOptions(rotations=("R3", "R4")))
    names = [n for n, m in model.named_modules() if Attention.matches(m)]
    for target in rotate.find_targets(rewriter.graph, {**rewriter.specs, names[0]: KEYS}).names:
        rotate.apply(rewriter, target, {})
    assert set(model.state_dict()) > set(before)
    rewriter.undo_log.restore()
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_twice_is_once_too_often() -> None:
    model = build_model("llama")
    rewriter = GraphRewriter(model, find_graph(model))
    for name in (DOWN, "model.layers.0.self_attn"):
        turn = rewriter.rotate_input_online if name == DOWN else rewriter.rotate_scores_online
        turn(name, OnlineRotation.make(16, "hadamard", 0))
        with pytest.raises(ModelError, match="turns what comes to it already"):
            turn(name, OnlineRotation.make(16, "hadamard", 0))


CONFIG = PTQConfig(
    weight="int8:channel", activations="float",
    overrides={
        "*_proj": {"weight": "int8:channel", "input": "int8:token:dyn"},
        "*self_attn": {"key": "int4:token:dyn", "value": "int4:token:dyn"},
        "*norm": None, "*embed_tokens": None, "lm_head": None,
    },
)  # fmt: skip


def rotated(ids: list[Tensor], *names: str) -> nn.Module:
    model = prepare(build_model("llama"), CONFIG)
    turn = {"algorithm": "rotate", "rotations": names}
    calibrate(model, ids, stack={"fold": "fold_norms", "turn": turn, "round": "rtn"})
    return model


def test_keys_are_turned_where_their_points_see_them(token_batches: list[Tensor]) -> None:
    model = rotated(token_batches, "R3")
    for _, module in iter_wrapped(model):
        for quantizer in module.point_quantizers().values():
            quantizer.enabled = False
    assert len([name for name, _ in model.named_modules() if name.endswith("self_attn.online_rotation")]) == 2
    expected = build_model("llama")(token_batches[0]).logits
    torch.testing.assert_close(model(token_batches[0]).logits, expected, rtol=1e-4, atol=1e-4)
    seen: list[Tensor] = []
    module = model.get_submodule("model.layers.0.self_attn")
    module.quantizers["key"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(token_batches[0])
    module._modules.pop("online_rotation")
    model(token_batches[0])
    assert float((seen[1] - seen[0]).norm() / seen[0].norm()) > 0.5
    torch.testing.assert_close(seen[1].norm(dim=-1), seen[0].norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded_to_the_bit(token_batches: list[Tensor], tmp_path: Path) -> None:
    model = rotated(token_batches, "R1", "R2", "R3", "R4")
    fake = model(token_batches[0]).logits
    model = convert(model)
    outputs = model(token_batches[0]).logits
    torch.testing.assert_close(outputs, fake)
    text = model.generate(token_batches[1], max_new_tokens=6, do_sample=False)
    save_model(model, RunFolder(tmp_path))
    loaded = load(tmp_path)
    assert torch.equal(loaded(token_batches[0]).logits, outputs)
    assert torch.equal(loaded.generate(token_batches[1], max_new_tokens=6, do_sample=False), text)
    assert any(name.endswith("down_proj.online_rotation.left") for name, _ in loaded.named_buffers())


def test_kernels_get_turned_inputs(token_batches: list[Tensor]) -> None:
    down = convert(rotated(token_batches, "R4")).get_submodule(DOWN)
    x = torch.randn(5, 96)
    expected = down(x)
    choose_kernels(down, "int8_mm")
    assert down.kernel_type is not None
    torch.testing.assert_close(down(x), expected, rtol=1e-4, atol=1e-4)


def test_the_plan_names_the_points(make_plan: MakePlan) -> None:  # noqa: F811
    cache = "cache: {match: {type: Attention}, points: {key: 'int4:token:dyn'}}"
    plan = make_plan(f"{LINEAR}\n{cache}", f"turn: {{algorithm: rotate, rotations: [R3, R4]}}\n{TAIL}")
    assert plan.stages[0].targets[0] == "model.layers.0.self_attn.key"
    assert plan.stages[0].online[-1].endswith("mlp.down_proj")


@pytest.mark.parametrize(
    ("stack", "what"),
    [
        ("turn: {algorithm: rotate, rotations: [R3]}", "rotate has nothing to do: no queries or keys are quantized"),
        (
            "turn: {algorithm: rotate, rotations: [R4]}\nagain: {algorithm: rotate, rotations: [R4]}",
            "again would change the input of model.layers.0.mlp.down_proj, which turn changes at each forward",
        ),
    ],
)
def test_stacks_that_cannot_work(stack: str, what: str, refusal: object) -> None:  # noqa: F811
    assert what in refusal(LINEAR, f"{stack}\n{TAIL}")  # type: ignore[operator]


def test_nothing_is_moved_across_what_is_turned(make_plan: MakePlan) -> None:  # noqa: F811
    plan = make_plan(LINEAR, f"turn: {{algorithm: rotate, rotations: [R4]}}\nequal: {{algorithm: cle}}\n{TAIL}")
    down = "model.layers.0.mlp.down_proj"
    assert any(f"{down}, whose input turn changes at each forward" in note for note in plan.notes)
    assert "model.layers.0.mlp.up_proj" not in plan.stages[1].targets


def test_what_is_turned_may_be_divided_behind_that(make_plan: MakePlan) -> None:  # noqa: F811
    smooth = "smooth: {algorithm: smoothquant, feeds: online}"
    rules = LINEAR.replace("int8:channel", "int8:channel, input: 'int8:token:dyn'")
    plan = make_plan(rules, f"turn: {{algorithm: rotate, rotations: [R4]}}\n{smooth}\n{TAIL}")
    assert "model.layers.0.mlp.down_proj.input" in plan.stages[1].targets


def test_what_was_scaled_before_may_be_turned(make_plan: MakePlan) -> None:  # noqa: F811
    stack = "equal: {algorithm: cle}\nturn: {algorithm: rotate, rotations: [R2, R4]}"
    plan = make_plan(LINEAR, f"{stack}\n{TAIL}")
    assert [stage.name for stage in plan.stages] == ["equal", "turn", "round"]
