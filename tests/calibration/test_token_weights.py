"""Rows of a weight's input that count by the gradient of the model's loss: against all of it worked out at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import wrapq
import wrapq.half_products as half_products
from tests.calibration.conftest import as_batches, gptq_walker
from wrapq import PTQConfig, prepare
from wrapq.algorithms.base import Rounded
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.algorithms.rtn import RTN
from wrapq.calibration import token_weights
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.forwards import Unobserved
from wrapq.calibration.token_weights import TokenWeights, gather_token_weights, linears_by_gradient
from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch
from wrapq.observers.forward_context import in_context
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.input import InputStatistics
from wrapq.wrappers.model import iter_quantizers

WEIGHTS = PTQConfig(weight="int4:g16:sym", activation=None, overrides={"model.embed_tokens": None, "*norm*": None})
BY_GRADIENT = GPTQ(GPTQOptions(gradient=True))


def gathered(model: nn.Module, batches: list[Batch]) -> TokenWeights:
    points = [point.where for point in iter_quantizers(model)]
    modules = linears_by_gradient(model, Assignments(dict.fromkeys(points, BY_GRADIENT)))
    return gather_token_weights(model, enumerate(batches), modules)


def literal(model: nn.Module, batch: Batch, number: int) -> dict[str, Tensor]:
    """Squared gradients [tokens] by module, of all logits at once, of a model that is not wrapped."""
    outputs: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        module.register_forward_hook(lambda m, a, output, name=name: outputs.__setitem__(name, output))
        for name, module in linears.items()
    ]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embedding.register_forward_hook(lambda m, a, output: output.requires_grad_()))
    log_p = model(**batch.inputs).logits.float().log_softmax(-1)
    generator = torch.Generator().manual_seed(number)
    drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator).reshape(log_p.shape[:2])
    loss = -log_p.gather(-1, drawn[..., None])[..., 0]
    real = torch.ones_like(drawn, dtype=torch.bool) if batch.mask is None else batch.mask.bool()
    gradients = torch.autograd.grad(loss[real].sum(), list(outputs.values()))
    for handle in handles:
        handle.remove()
    named = zip(outputs, gradients, strict=True)
    return {name: g.double().square().sum(-1)[real] for name, g in named if name != "lm_head"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_they_are_the_squared_gradients(
    family: str, make_model: Callable[..., nn.Module], token_batches: list[Tensor]
) -> None:
    model, batches = make_model(family), as_batches(token_batches)
    wrapped = prepare(copy.deepcopy(model), PTQConfig(weight="int4:g16:sym", activation="int8:tensor:asym"))
    found = gathered(wrapped, batches)
    for number, batch in enumerate(batches):
        for name, expected in literal(model, batch, number).items():
            got = found[f"{name}.weight"][number].double()
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_they_come_from_products_made_in_float32_too(
    make_model: Callable[..., nn.Module], token_batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block runs again on the way back, and some of its layers are not wrapped."""
    monkeypatch.setattr(half_products, "_widens", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(half_products, "_LEAST_ROWS", 1)
    some = PTQConfig(weight="int4:g16:sym", activation=None, overrides={"*embed*": None, "*o_proj": None})
    model, found = prepare(make_model("llama").bfloat16(), some), []
    for using in (nullcontext(), half_products.fast_half_products()):
        with using:
            found.append(gathered(model, as_batches(token_batches)[:1]))
    for name, by_batch in found[0].items():
        weights = by_batch[0]
        torch.testing.assert_close(found[1][name][0], weights, rtol=0.3, atol=0.05 * float(weights.max()))


def test_parts_of_the_positions_give_what_all_give_and_blocks_keep_nothing(
    make_model: Callable[..., nn.Module], token_batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = as_batches(token_batches)
    drawn: list[Tensor] = []

    def draw(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
        drawn.append(p)
        return p.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)
    likeliest = gathered(prepare(make_model("llama"), WEIGHTS), batches[:1])
    assert len(drawn) == 1
    monkeypatch.setattr(token_weights, "ELEMENTS", 4 * 2 * 5 * 97)
    monkeypatch.setattr(wrapq.graph.head, "ELEMENTS", 1)
    parts = gathered(prepare(make_model("llama"), WEIGHTS), batches[:1])
    assert len(drawn) > 2 and likeliest.keys() == parts.keys()
    for name, weights in likeliest.items():
        torch.testing.assert_close(parts[name][0], weights[0], rtol=1e-3, atol=1e-5 * float(weights[0].max()))


def test_padding_counts_for_nothing(make_model: Callable[..., nn.Module], token_batches: list[Tensor]) -> None:
    ids, mask = token_batches[0], torch.ones_like(token_batches[0], dtype=torch.bool)
    mask[0, 7:] = False
    batch = Batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask)
    model = make_model("llama")
    found, expected = gathered(prepare(copy.deepcopy(model), WEIGHTS), [batch]), literal(model, batch, 0)
    for name, weights in expected.items():
        got = found[f"{name}.weight"][0]
        assert got.shape == (int(mask.sum()),)
        torch.testing.assert_close(got.double(), weights, rtol=1e-3, atol=1e-5 * float(weights.max()))


def test_rows_count_by_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x, moved, weights = (torch.randn(40, *more, generator=generator) for more in ((16,), (16,), ()))
    statistics = InputStatistics(("hessian", "cross", "mean", "gradient"))
    statistics.add(x, x + moved, weights=weights.square())
    counted = torch.diag(weights.square())
    torch.testing.assert_close(statistics.get("hessian", "w"), x.t() @ counted @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.get("cross", "w"), moved.t() @ counted @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.get("mean", "w"), x.mean(0))


class Keeping(RTN):
    """Rounds to nearest and keeps the Hessians it was given."""

    needs = ("hessian", "gradient")

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}

    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        assert statistics is not None
        self.given[where] = statistics.get("hessian", where)
        return super().round(weight, spec, where)


def test_a_walk_sums_a_hessian_by_them_for_each_weight(
    make_model: Callable[..., nn.Module], token_batches: list[Tensor]
) -> None:
    model, batches, rounder = prepare(make_model("llama"), WEIGHTS), as_batches(token_batches), Keeping()
    inputs: list[Tensor] = []
    first = model.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad(), in_context(calibration=Unobserved(quantizes=False)):
        handle = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        for batch in batches:
            model(**batch.inputs)
        handle.remove()
    weights = gathered(model, batches)
    gptq_walker(model, rounder, token_weights=weights).run(batches, "parallel")
    for name in ("q_proj", "k_proj", "v_proj"):
        where = f"model.layers.0.self_attn.{name}.weight"
        rows = zip(inputs, weights[where].values(), strict=True)
        expected = sum(x.double().t() @ (x.double() * w.double()[:, None]) for x, w in rows)
        torch.testing.assert_close(rounder.given[where].double(), expected, rtol=1e-3, atol=1e-6)


def test_the_api_gathers_them(make_model: Callable[..., nn.Module], token_batches: list[Tensor]) -> None:
    results = []
    for gradient in (True, True, False):
        model = prepare(make_model("llama"), WEIGHTS)
        stack = {"round": {"algorithm": "gptq", "gradient": gradient}}
        wrapq.calibrate(model, [{"input_ids": ids} for ids in token_batches], stack)
        results.append(wrapq.convert(model)(token_batches[0]).logits)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_model_without_logits_is_refused(make_model: Callable[..., nn.Module]) -> None:
    model = prepare(nn.Sequential(nn.Linear(16, 16)), PTQConfig(weight="int4:g16:sym", activation=None))
    with pytest.raises(CalibrationError, match="Sequential makes no logits of tokens"):
        wrapq.calibrate(model, [torch.randn(4, 16)], {"round": {"algorithm": "gptq", "gradient": True}})
