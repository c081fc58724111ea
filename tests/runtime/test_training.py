"""A quantized model is an ordinary module to autograd, to peft and to torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wrapq
from tests.models import DEMO
from wrapq import PTQConfig
from wrapq.runtime import prefix

IDS = torch.arange(2 * 20).view(2, 20)
SPECS = [
    ("int4:g16:sym", None),
    ("int8:channel", "int8:tensor:asym"),
    ("uint4:g16:asym", "int8:token:sym:dyn"),
    ("nf4:g16", None),
    ("fp8_e4m3:channel", "fp8_e4m3:token:dyn"),
]


def converted(model: nn.Module, weight: str, activation: str | None, ids: Tensor = IDS) -> nn.Module:
    left_float = {"*embed*": None, "lm_head": None}
    model = wrapq.prepare(model, PTQConfig(weight=weight, activation=activation, overrides=left_float))
    wrapq.calibrate(model, [{"input_ids": ids}], {"round": "rtn"})
    return wrapq.convert(model)


@pytest.mark.parametrize(("weight", "activation"), SPECS)
def test_gradients_go_straight_through(weight: str, activation: str | None) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)), torch.randn(64, 32)
    model = wrapq.prepare(net, PTQConfig(weight=weight, activation=activation))
    wrapq.calibrate(model, [x], {"round": "rtn"})
    model = wrapq.convert(model)
    given = x.clone().requires_grad_()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda m, args, output: seen.append(output))
    made = model(given)
    made.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x), made)  # what is computed stays the same to the bit
    expected = (model[2].weight.sum(0) * (1 - seen[0].double() ** 2)) @ model[0].weight.double()
    torch.testing.assert_close(given.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("weight", "activation"), SPECS)
def test_the_compiler_makes_one_graph_of_it(
    weight: str, activation: str | None, make_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_kept", False)  # no other model of this process has one
    model = converted(make_model("llama"), weight, activation)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(lambda ids: model(input_ids=ids, use_cache=False).logits)(IDS)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("activation", [None, "int8:token:dyn"])
def test_adapters_are_trained_on_the_shipped_model(activation: str | None) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (DEMO / "calib.txt").read_text()[:20000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"][:1024]).view(4, 256)
    model = converted(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), "int4:g64:sym", activation, ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, adapters)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.02
    after = {name.replace("base_layer.", ""): t for name, t in tuned.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
