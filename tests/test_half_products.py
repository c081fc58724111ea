"""Products in 16 bits on a CPU: as exact as torch's own, and only while a run asks for them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import wrapq.half_products as half_products
from wrapq.half_products import fast_half_products, in_products

HALVES = [torch.bfloat16, torch.float16]
KINDS = {
    "linear": lambda x, w, b: linear(x, w, b),
    "linear, bias by name": lambda x, w, b: linear(x, w, bias=b),
    "linear, no bias": lambda x, w, b: linear(x, w) + b,
    "matmul": lambda x, w, b: x @ w.t() + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
}


@pytest.fixture(params=[True, False], ids=["widened", "as this CPU has it"])
def either(request, monkeypatch):
    """Every CPU takes the way of one without matrix units, and then its own."""
    if request.param:
        monkeypatch.setattr(half_products, "_widens", lambda dtype: dtype in HALVES)


def drawn(rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 96), (64, 96), (64,))]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 127, 128, 300])
@pytest.mark.parametrize("product", KINDS.values(), ids=KINDS)
def test_a_product_is_off_by_its_rounding_alone(either, product, rows, dtype):
    x, w, b = drawn(rows, dtype)
    exact = x.double() @ w.double().t() + b.double()
    with fast_half_products(), in_products():
        found = product(x, w, b)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0.1)


def test_of_many_rows_it_is_the_rounded_product_in_float32(monkeypatch):
    monkeypatch.setattr(half_products, "_widens", lambda dtype: dtype in HALVES)
    x, w, b = drawn(256, torch.bfloat16)
    wide = linear(x.float(), w.float(), b.float()).bfloat16()
    with fast_half_products(), in_products():
        assert torch.equal(linear(x, w, b), wide)
        assert torch.equal(linear(x.view(4, 64, 96), w, b), wide.view(4, 64, -1))


@torch.no_grad()
def test_a_large_weight_is_widened_in_parts(monkeypatch):
    monkeypatch.setattr(half_products, "_widens", lambda dtype: dtype in HALVES)
    x, w, b = drawn(256, torch.bfloat16)
    with fast_half_products(), in_products():
        whole = linear(x, w, b), linear(x, w)
        monkeypatch.setattr(half_products, "_AT_ONCE", 96 * 7)
        for one, found in zip(whole, (linear(x, w, b), linear(x, w)), strict=True):
            torch.testing.assert_close(found, one, rtol=0.01, atol=1e-3)


def test_other_dtypes_and_devices_are_left_alone(either):
    x, w, b = drawn(256, torch.float32)
    ids = torch.arange(256 * 2).view(256, 2)
    with fast_half_products(), in_products():
        assert torch.equal(linear(x, w, b), linear(x, w, b))
        assert (ids @ ids.t()).dtype == torch.int64
        assert linear(x.bfloat16().to("meta"), w.bfloat16().to("meta")).device.type == "meta"
        into = torch.empty(256, 64, dtype=torch.bfloat16)
        assert torch.matmul(x.bfloat16(), w.bfloat16().t(), out=into) is into


def test_gradients_are_those_of_the_product(either):
    layer, (x, _, _) = nn.Linear(96, 64, dtype=torch.bfloat16), drawn(200, torch.bfloat16)
    grads = []
    for using in (fast_half_products, nullcontext):
        layer.zero_grad()
        with using(), in_products():
            layer(x).square().sum().backward()
        grads.append(layer.weight.grad.float())
    assert grads[0].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_only_products_of_a_run_are_changed(monkeypatch):
    monkeypatch.setattr(half_products, "_widens", lambda dtype: dtype in HALVES)
    modes = torch.overrides._get_current_function_mode_stack
    with in_products():
        assert not modes() and not half_products.use_matrix_units()
    with pytest.raises(ZeroDivisionError), fast_half_products():
        assert not modes() and half_products.use_matrix_units()
        with in_products():
            assert len(modes()) == 1
            raise ZeroDivisionError
    assert not modes() and not half_products.use_matrix_units()


@pytest.mark.parametrize(
    ("name", "has", "widened"),
    [
        ("Intel(R) Xeon(R)", {"avx512_bf16"}, HALVES),
        ("Intel(R) Xeon(R)", {"avx512_bf16", "amx_bf16"}, [torch.float16]),
        ("AMD EPYC", {"avx512_bf16"}, [torch.float16]),
        ("AMD EPYC", set(), HALVES),
    ],
)
def test_what_is_widened_depends_on_the_processor(monkeypatch, name, has, widened):
    capabilities = {"architecture": "x86_64", "cpu_name": name} | dict.fromkeys(has, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    found = [dtype for dtype in [*HALVES, torch.float32] if half_products._widens.__wrapped__(dtype)]
    assert found == [dtype for dtype in [torch.bfloat16, torch.float16] if dtype in widened]
