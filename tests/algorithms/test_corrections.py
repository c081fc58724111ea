"""Corrections of rounded weights: against the papers' formulas in float64, and in a model through its whole life."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.algorithms.test_gptq import problem
from tests.conftest import build_model
from wrapq import PTQConfig, convert, prepare
from wrapq.algorithms.low_rank import low_rank
from wrapq.errors import PlanError
from wrapq.runtime.choose import choose_kernels


def literal_eora(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """EoRA, equations 3 to 5: project by Q L^1/2, cut the singular values, project back."""
    values, vectors = torch.linalg.eigh(hessian)
    into = vectors * values.sqrt()
    u, s, vh = torch.linalg.svd(error @ into, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(into)


@pytest.mark.parametrize("shape", [(24, 64), (64, 64), (96, 64)], ids=["wide", "square", "tall"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_repair_is_eoras(shape, rank):
    weight, statistics = problem(*shape)
    hessian, error = statistics.sums["hessian"].double(), weight.double() * 0.1
    a, b = low_rank(error, hessian, rank)
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    torch.testing.assert_close(b @ a, literal_eora(error, hessian, rank), rtol=1e-6, atol=1e-8)


def test_a_singular_hessian_needs_no_inverse():
    weight, hessian = torch.randn(40, 16, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    hessian[:3, :3] = torch.eye(3, dtype=torch.float64)
    a, b = low_rank(weight, hessian, 3)
    left = weight - b @ a
    assert float(((left @ hessian) * left).sum()) < 1e-20


def batches(count: int = 3) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 96, (2, 12), generator=generator), "use_cache": False} for _ in range(count)]


def logits(model: nn.Module) -> Tensor:
    return torch.cat([model(**batch).logits.flatten() for batch in batches()])


def made(family: str, stack: dict[str, object], **config: object) -> tuple[nn.Module, wrapq.Calibrated]:
    overrides = {} if family == "gpt2" else {"lm_head": None}
    given = PTQConfig(**{"weight": "int3:channel:sym", "activation": None, "overrides": overrides, **config})
    prepared = prepare(build_model(family), given)
    return prepared, wrapq.calibrate(prepared, batches(), stack)


STACKS = {
    "bias": {"round": "rtn", "fix": "bias_correction"},
    "empirical bias": {"round": "rtn", "fix": {"algorithm": "bias_correction", "empirical": True}},
    "low rank": {"round": "rtn", "fix": {"algorithm": "low_rank", "rank": 8}},
    "all": {"round": "gptq", "repair": {"algorithm": "low_rank", "rank": 8}, "fix": "bias_correction"},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", STACKS)
def test_a_correction_helps_and_outlives_conversion_to_the_bit(family, name):
    expected = logits(build_model(family))
    plain, _ = made(family, {"round": STACKS[name]["round"]})
    corrected, _ = made(family, STACKS[name])
    before, after = ((logits(model) - expected).square().mean() for model in (plain, corrected))
    assert after < 0.99 * before
    fake = logits(corrected)
    converted = convert(corrected)
    assert torch.equal(logits(converted), fake)
    assert torch.equal(logits(copy.deepcopy(converted)), fake)


def test_the_analytic_bias_makes_the_mean_error_of_the_first_layer_zero():
    prepared, _ = made("llama", STACKS["bias"])
    layer = prepared.model.layers[0].self_attn.q_proj
    rows = torch.cat(
        [
            prepared.model.layers[0].input_layernorm(prepared.model.embed_tokens(b["input_ids"])).flatten(0, 1)
            for b in batches()
        ]
    )
    wanted = nn.functional.linear(rows, layer.original.weight).mean(0)
    got = nn.functional.linear(rows, layer.weight, layer.bias).mean(0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_empirical_bias_makes_the_mean_of_every_layer_the_float_models():
    prepared, _ = made("llama", STACKS["empirical bias"])
    reference = build_model("llama")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        means = []
        for model in (prepared, reference):
            seen: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_hook(
                lambda m, i, o, seen=seen: seen.append(o.flatten(0, 1))
            )
            logits(model)
            hook.remove()
            means.append(torch.cat(seen).mean(0))
        torch.testing.assert_close(means[0], means[1], rtol=1e-3, atol=1e-4)


def test_kernels_add_the_repair():
    x, config = torch.randn(4, 64), PTQConfig(weight="int8:channel:sym", activation=None, overrides={})
    prepared = prepare(nn.Sequential(nn.Linear(64, 32)), config)
    wrapq.calibrate(prepared, [x], {"round": "rtn"})
    prepared[0].weight_quantizer.correct(None, torch.randn(4, 64), torch.randn(32, 4))
    converted = convert(prepared)
    expected = converted(x)
    report = choose_kernels(converted, "int8_weight")
    assert report.counts() == {"int8_weight": 1}
    torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-3)


def test_two_rounders_of_one_weight_and_two_biases_are_refused():
    with pytest.raises(PlanError, match="would decide the same points"):
        made("llama", {"a": "rtn", "b": "hqq"})
