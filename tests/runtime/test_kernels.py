"""Kernels give what the reference gives, and leave the module what it was."""

import copy
import ctypes
import gc
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import wrapq
from tests.runtime.sizes import resident_bytes
from wrapq import PTQConfig, convert, prepare
from wrapq.errors import UnknownNameError
from wrapq.quant.qparams import QParams
from wrapq.runtime import int4 as int4_module
from wrapq.runtime.choose import choose_kernels
from wrapq.runtime.kernel import KERNELS, REFERENCE, Kernel
from wrapq.runtime.module import QuantizedWeight

INT8 = ("int8_mm", "int8_onednn", "int8_fbgemm")
COLUMNS = 512
INT8_FBGEMM = KERNELS.get("int8_fbgemm")
ACTIVATIONS = (
    "int8:token:dyn",
    "int8:tensor:dyn",
    "int8:tensor",
    "int8:tensor:asym",
    "uint8:tensor:asym",
    "int6:token:dyn",
)
WEIGHTS4 = ("int4:g32", "int4:g32:signed", "int4:g128", "int4:g256:asym", "uint4:g64:asym", "uint4:g32:sym")
CASES = [(kernel, "int8:channel", activation) for kernel in INT8 for activation in ACTIVATIONS]
CASES += [(kernel, "int8:tensor", "int8:token:dyn") for kernel in INT8]
CASES += [("int8_weight", "int8:channel", None)]
CASES += [("fp8_mm", "fp8_e4m3:channel", f"fp8_e4m3:{scales}") for scales in ("token:dyn", "tensor:dyn", "tensor")]
CASES += [("fp8_mm", "fp8_e4m3:tensor", "fp8_e4m3:token:dyn")]
CASES += [("int4_cpu", weight, None) for weight in WEIGHTS4]
CASES += [("int4_cpu", "int4:g64", "int8:token:dyn"), ("int4_cpu", "uint4:g64:asym", "uint8:tensor:asym")]
if torch.cuda.is_available():
    on_cuda = [case for case in CASES if case[0] in ("int8_mm", "int8_weight", "fp8_mm")]
    on_cuda += [("int4_cuda", *points) for kernel, *points in CASES if kernel == "int4_cpu"]
    on_cuda += [("fp8_block", "fp8_e4m3:b128x128", "fp8_e4m3:g128:dyn")]
    CASES = [*((*case, "cpu") for case in CASES), *((*case, "cuda") for case in on_cuda)]
else:
    CASES = [(*case, "cpu") for case in CASES]
SHAPES = [(*rows, COLUMNS) for rows in ((1,), (2,), (17,), (128,), (2, 5), (1, 1), (0,))]
BFLOAT = 2.0**-8


def layer(
    weight: str, activation: str | None, bias: bool = True, rows: int = 192, kind: str = "linear"
) -> QuantizedWeight:
    torch.manual_seed(0)
    linear = nn.Linear(COLUMNS, rows, bias=bias) if kind == "linear" else Conv1D(rows, COLUMNS)
    points = {"weight": weight} | ({"input": activation} if activation else {})
    model = prepare(nn.Sequential(linear), PTQConfig(weight, None, {"0": points}))
    model(torch.randn(64, COLUMNS))
    return convert(model)[0]


def tolerance(kernel: str) -> float:
    """How far, relative to the largest output, float32 sums, a tensor core's or bfloat16 operands may take a kernel."""
    if kernel == "fp8_mm" and torch.cuda.is_available():
        return 1e-3
    return 1e-5 if kernel in (*INT8, "fp8_mm") else 2 * BFLOAT


def assert_near(y: Tensor, expected: Tensor, kernel: str) -> None:
    assert y.shape == expected.shape and y.dtype == expected.dtype
    if expected.numel():
        assert (y - expected).abs().max() <= tolerance(kernel) * expected.abs().max()


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> tuple[str, QuantizedWeight]:
    kernel, weight, activation, device = request.param
    module = layer(weight, activation).to(device)
    if (reason := KERNELS.get(kernel).unsupported(module)) is not None:
        pytest.skip(reason)
    return kernel, module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_those_of_the_reference(case: tuple[str, QuantizedWeight], shape: tuple[int, ...]) -> None:
    kernel, module = case
    x = torch.randn(shape).to(module.weight_device)
    expected = module(x)
    module.use_kernel(KERNELS.get(kernel))
    assert_near(module(x), expected, kernel)
    assert_near(module(x), expected, kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_half_precision_outputs(
    case: tuple[str, QuantizedWeight], dtype: torch.dtype
) -> None:
    kernel, module = case
    module.weight_dtype, module.bias = dtype, nn.Parameter(module.bias.to(dtype), requires_grad=False)
    x = torch.randn(9, COLUMNS).to(module.weight_device, dtype)
    expected = module(x)
    module.use_kernel(KERNELS.get(kernel))
    y = module(x)
    assert y.dtype == dtype
    assert (y.float() - expected.float()).abs().max() <= 3 * BFLOAT * expected.float().abs().max()


def test_state_copies_and_moves(case: tuple[str, QuantizedWeight], tmp_path: Path) -> None:
    kernel, module = case
    before, x = {name: t.clone() for name, t in module.state_dict().items()}, torch.randn(3, COLUMNS)
    x = x.to(module.weight_device)
    weight = module.weight.clone()
    module.use_kernel(KERNELS.get(kernel))
    expected = module(x)
    assert module._buffers["weight_packed"] is None, "the layout takes the place of the packed weight"
    assert list(module.state_dict()) == list(before)
    assert all(t.is_contiguous() for t in module.state_dict().values())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert torch.equal(module.weight_packed, before["weight_packed"]) and torch.equal(module.weight, weight)
    twin = copy.deepcopy(module)
    assert twin._kernel is None and twin._buffers["weight_packed"] is not None
    assert torch.equal(twin(x), expected)
    module.to(module.weight_device)
    assert module._kernel is None and torch.equal(module._buffers["weight_packed"], before["weight_packed"])
    assert torch.equal(module(x), expected)
    other = {name: t.clone() for name, t in before.items()}
    other["weight_scale"] = other["weight_scale"] * 2
    module.load_state_dict(other)
    assert module._kernel is None
    doubled = module(x)
    module.use_kernel(None)
    assert_near(doubled, module(x), kernel)
    pickle.dumps(module.__getstate__()["_buffers"])


@pytest.mark.parametrize(
    ("kernel", "weight", "activation"), [("int8_mm", "int8:channel", "int8:token:dyn"), ("int4_cpu", "int4:g32", None)]
)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_layout(kernel: str, weight: str, activation: str | None, kind: str, bias: bool) -> None:
    module, x = layer(weight, activation, bias, kind=kind), torch.randn(4, COLUMNS)
    expected = module(x)
    module.use_kernel(KERNELS.get(kernel))
    assert_near(module(x), expected, kernel)


@pytest.mark.parametrize("rows", [16, 80, 192])
@pytest.mark.parametrize("weight", WEIGHTS4)
def test_the_second_route_of_four_bits(weight: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_module, "fast_half", lambda device: False)
    module, x = layer(weight, None, rows=rows), torch.randn(40, COLUMNS)
    expected = module(x)
    module.use_kernel(KERNELS.get("int4_cpu"))
    assert_near(module(x), expected, "int4_cpu")
    assert_near(module(x[:3]), expected[:3], "int4_cpu")
    module.forget_kernel()
    assert torch.equal(module(x[:3]), module(x[:3]))


@pytest.mark.parametrize("rows", [16, 80, 192])
def test_four_bits_come_back_from_any_layout(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer("int4:g32", None, rows=rows)
    codes = module.codes()
    assert torch.equal(KERNELS.get("int4_cpu")(module).codes(), codes)
    monkeypatch.setattr(int4_module, "_block", lambda: None)
    assert torch.equal(KERNELS.get("int4_cpu")(module).codes(), codes)


@pytest.mark.parametrize("tiles", [8, 4, 2])
def test_the_layout_for_cuda_is_read_back(tiles: int) -> None:
    """Against torch's kernel that writes it (int4mm.cu, matrix_to_m16n8k16_Bint4_layout), transcribed."""
    n, k = 16, 32 * tiles
    unsigned = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.zeros(n // 8, k // (tiles * 16), 32, tiles // 2, dtype=torch.int64)
    for row_tile, column_tile, thread, word in itertools.product(*map(range, packed.shape)):
        columns = []
        for start in ((column_tile * tiles + 2 * word) * 16, (column_tile * tiles + 2 * word + 1) * 16):
            first = start + thread % 4 * 2
            columns += [first, first + 1, first + 8, first + 9]
        row = row_tile * 8 + thread // 4
        for place, which in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed[row_tile, column_tile, thread, word] |= unsigned[row, columns[which]].long() << 4 * place
    assert torch.equal(int4_module._unpack_tiles(packed.to(torch.int32)), unsigned.to(torch.uint8))


def test_groups_in_an_activation_order() -> None:
    module, x = layer("int4:g32", None), torch.randn(5, COLUMNS)
    old, order = module.qparams("weight"), torch.randperm(COLUMNS)
    qparams = QParams(old.spec, old.scale, old.zero_point, order)
    module.set_weight(qparams.quantize(torch.randn(192, COLUMNS) * 0.05), qparams)
    codes, expected = module.codes(), module(x)
    module.use_kernel(KERNELS.get("int4_cpu"))
    assert_near(module(x), expected, "int4_cpu")
    assert torch.equal(module.codes(), codes)


def test_integers_of_an_input_are_shared_only_while_they_are_true() -> None:
    module = layer("int8:channel", "int8:token:dyn")
    x = torch.randn(4, COLUMNS)
    module.use_kernel(KERNELS.get("int8_mm"))
    first = module(x).clone()
    assert torch.equal(module(x), first)
    x.mul_(-3)
    assert not torch.allclose(module(x), first)
    reference = copy.deepcopy(module)
    reference.use_kernel(None)
    assert_near(module(x), reference(x), "int8_mm")
    with torch.inference_mode():
        y = torch.randn(4, COLUMNS)
        one = module(y).clone()
        y.mul_(2)
        assert_near(module(y), reference(y), "int8_mm")
        assert not torch.equal(module(y), one)


def test_gradients_take_the_reference() -> None:
    module = layer("int8:channel", None)
    module.specs["input"] = wrapq.QuantSpec.parse("int8:token:dyn")
    module.use_kernel(KERNELS.get("int8_mm"))
    x = torch.randn(3, COLUMNS, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and module._kernel is None


@pytest.mark.parametrize(
    ("weight", "activation", "kernel", "reason"),
    [
        ("int3:g32", None, "int4_cpu", "not a 4 bit integer"),
        ("int4:channel", None, "int4_cpu", "not in groups of"),
        ("int4:g16", None, "int4_cpu", "not in groups of"),
        ("int4:g32:asym:zero=float", None, "int4_cpu", "float zero points"),
        ("int4:g32", "int16:tensor", "int4_cpu", "at most 8 bits"),
        ("int8:g32", None, "int8_mm", "per group"),
        ("int8:channel:asym", "int8:token:dyn", "int8_mm", "not symmetric int8"),
        ("int8:g32", "int8:token:dyn", "int8_onednn", "per group"),
        ("int8:g32", "int8:token:dyn", "int8_fbgemm", "per group"),
        ("int8:channel", "uint8:token:asym:dyn", "int8_mm", "dynamic zero points"),
        ("fp8_e5m2:channel", "fp8_e4m3:token:dyn", "fp8_mm", "is not fp8_e4m3"),
        ("fp8_e4m3:b128x128", "fp8_e4m3:token:dyn", "fp8_mm", "a scale per block"),
        ("fp8_e4m3:channel", "fp8_e4m3:g128:dyn", "fp8_mm", "one scale per group"),
        ("fp8_e4m3:channel", "int8:token:dyn", "fp8_mm", "input int8 is not fp8_e4m3"),
        ("int8:channel", "int8:channel@-1", "int8_mm", "one scale per channel"),
    ],
)
def test_what_a_kernel_cannot_do_is_said(weight: str, activation: str | None, kernel: str, reason: str) -> None:
    model = nn.Sequential(layer(weight, activation))
    x = torch.randn(3, COLUMNS)
    expected = model(x)
    for policy in (kernel, "auto"):
        (choice,) = choose_kernels(model, policy).choices
        assert choice.kernel == REFERENCE and reason in choice.reason
        assert torch.equal(model(x), expected)


def test_rows_that_do_not_fit_and_a_forward_of_its_own() -> None:
    (choice,) = choose_kernels(nn.Sequential(layer("int4:g32", None, rows=24)), "int4_cpu").choices
    assert "24 rows are no multiple of 16" in choice.reason

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    prepared = prepare(nn.Sequential(Doubling(32, 16)), PTQConfig("int8:channel", "int8:token:dyn"))
    (choice,) = choose_kernels(convert(prepared), "auto").choices
    assert choice.kernel == REFERENCE and "forward of its own" in choice.reason


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8_fbgemm needs AVX512 VNNI")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="what malloc gave is read by glibc's mallinfo2")
@pytest.mark.parametrize("rows", [192, 200])
def test_fbgemm_takes_the_memory_that_it_says(rows: int) -> None:
    module = layer("int8:channel", "int8:token:dyn", rows=rows)
    assert not INT8_FBGEMM.unsupported(module) if rows == 192 else "20% more memory" in INT8_FBGEMM.unsupported(module)
    module.codes()
    before = allocated()
    kernels = [INT8_FBGEMM(module) for _ in range(50)]
    each = (allocated() - before) / len(kernels)
    assert kernels[0].hidden_bytes <= each <= kernels[0].hidden_bytes + 4096 + 8 * rows  # offsets, and the objects


def allocated() -> int:
    """Bytes that are in use of what malloc gave."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    found = mallinfo()
    return found.hblkhd + found.uordblks


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of mallinfo(3)."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split())


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(UnknownNameError, match="int8_mm"):
        choose_kernels(nn.Sequential(), "int8mm")


@pytest.mark.parametrize("spec", ["int8:channel", "int4:g32:asym", "uint3:tensor:asym", "int4:g32:asym:zero=float"])
def test_tables_read_only_their_rows(spec: str) -> None:
    model = convert(prepare(nn.Sequential(nn.Embedding(50, 64)), PTQConfig(spec, None)))
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    expected = model(ids)
    model[0].use_kernel(KERNELS.get("embedding_rows"))
    assert torch.equal(model(ids), expected)


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 320} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


def sqnr(y: Tensor, other: Tensor) -> float:
    return (20 * torch.log10(y.norm() / (y - other).norm())).item()


SCHEMES = [
    ("int8:channel", "int8:token:dyn"),
    ("int8:channel", "int8:tensor"),
    ("int8:channel", "uint8:tensor:asym"),
    ("int4:g32", None),
    ("uint4:g64:asym", None),
    ("int4:g32", "int8:token:dyn"),
    ("int8:channel", None),
    ("fp8_e4m3:channel", "fp8_e4m3:token:dyn"),
    ("fp8_e4m3:b128x128", "fp8_e4m3:g128:dyn"),
]
REST = SCHEMES[1:2] + SCHEMES[4:6] + SCHEMES[8:]
"""Slow on a CPU, where a kernel of theirs computes for another scheme too."""
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def converted(model: nn.Module, weight: str, activation: str | None, ids: Tensor) -> nn.Module:
    points = {"weight": weight} | ({"input": activation} if activation else {})
    overrides = {"*norm": None, "lm_head": None, "*embed_tokens": None, "*_proj": points}
    prepared = prepare(model, PTQConfig(weight, None, overrides))
    prepared(ids)
    return convert(prepared)


@pytest.mark.parametrize(
    ("source", "device", "weight", "activation"),
    [
        *(
            pytest.param(
                "random", device, *scheme, marks=pytest.mark.slow if device == "cpu" and scheme in REST else ()
            )
            for scheme in SCHEMES
            for device in DEVICES
        ),
        *(pytest.param("demo", "cpu", *scheme, marks=pytest.mark.slow) for scheme in SCHEMES),
    ],
)
def test_logits_are_as_near_the_float_model_as_the_fake_quantized(
    source: str, device: str, weight: str, activation: str | None
) -> None:
    if source == "demo":
        path = Path(wrapq.__file__).parent / "assets" / "demo"
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        text = (path / "heldout.txt").read_text(encoding="utf-8")[:24000]
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, :3072].view(12, 256)
    else:
        model = llama()
        ids = torch.randint(0, 320, (4, 96), generator=torch.Generator().manual_seed(1))
    model, ids = model.to(device), ids.to(device)
    floats = model(ids).logits
    model = converted(model, weight, activation, ids)
    reference = sqnr(floats, model(ids).logits)
    for policy in ["auto", *KERNELS]:
        report = choose_kernels(model, policy)
        assert len(report.choices) == 7 * len(model.model.layers)
        assert all((choice.kernel == REFERENCE) == bool(choice.reason) for choice in report.choices)
        assert sqnr(floats, model(ids).logits) == pytest.approx(reference, abs=0.1), policy


def test_generation_size_and_reference_again() -> None:
    ids = torch.randint(0, 320, (1, 24))
    model = converted(llama(), "int4:g32", None, ids)
    logits, packed = model(ids).logits, resident_bytes(model)
    report = choose_kernels(model, "int4_cpu")
    assert report.counts() == {"int4_cpu": 14} and "int4_cpu 14 modules" in report.summary()
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 30)
    assert resident_bytes(model) == packed
    projections = sum(c.bytes for c in report.choices)
    assert projections == sum(m_bytes(m) for m in model.modules() if isinstance(m, QuantizedWeight))
    assert report.table().count("\n") == 15 and "model.layers.1.mlp.down_proj" in report.table()
    choose_kernels(model, "reference")
    assert torch.equal(model(ids).logits, logits) and resident_bytes(model) == packed


def m_bytes(module: QuantizedWeight) -> int:
    return resident_bytes(module)


def test_tied_weights_stay_one() -> None:
    model = llama(tie_word_embeddings=True, vocab_size=320)
    ids = torch.randint(0, 320, (1, 24))
    model = convert(prepare(model, PTQConfig("int4:g32", None, {"*norm": None})))
    logits, state = model(ids).logits, model.state_dict()
    report = {choice.module: choice for choice in choose_kernels(model, "int4_cpu").choices}
    assert report["lm_head"].kernel == "int4_cpu"
    assert report["model.embed_tokens"].reason
    assert sqnr(logits, model(ids).logits) > 35
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_loading_with_a_kernel(tmp_path: Path) -> None:
    from wrapq.runs.checkpoint import save_model
    from wrapq.runs.folder import RunFolder

    ids = torch.randint(0, 320, (1, 24))
    model = converted(llama(), "int8:channel", "int8:token:dyn", ids)
    expected = model(ids).logits
    choose_kernels(model, "int8_mm")
    model(ids)
    folder = RunFolder.create(tmp_path, "model", 0)
    save_model(model, folder)
    assert torch.equal(wrapq.load(folder.path)(ids).logits, expected)
    fast = wrapq.load(folder.path, runtime="int8_mm")
    assert {m.kernel_type for m in fast.modules() if isinstance(m, QuantizedWeight)} == {KERNELS.get("int8_mm")}
    assert torch.equal(fast(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("weight", "activation"), [("int4:g32", None), ("int8:channel", None)])
def test_a_model_in_half_precision_generates_saves_and_loads(
    weight: str, activation: str | None, tmp_path: Path
) -> None:
    from wrapq.runs.checkpoint import save_model
    from wrapq.runs.folder import RunFolder

    ids = torch.randint(0, 320, (1, 24))
    model = converted(llama(eos_token_id=0), weight, activation, ids)
    logits, scales = model(ids).logits, [m.weight_scale.clone() for m in model.modules() if hasattr(m, "weight_scale")]
    choose_kernels(model, "int4_cpu" if weight.startswith("int4") else "int8_weight")
    model(ids)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and sqnr(logits, model(ids).logits.float()) > 30
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 27)
    after = [m.weight_scale for m in model.modules() if hasattr(m, "weight_scale")]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, scales, strict=True))
    choose_kernels(model, "reference")
    folder = RunFolder.create(tmp_path, "model", 0)
    save_model(model, folder)
    again = wrapq.load(folder.path)
    assert again.dtype == torch.bfloat16 and torch.equal(again(ids).logits, model(ids).logits)


def test_a_kernel_of_ones_own() -> None:
    @KERNELS.register("plain_matmul")
    class PlainMatmul(Kernel):
        """Dequantized once."""

        name, arithmetic, holds_weight = "plain_matmul", "float32", False

        @classmethod
        def unsupported(cls, module: QuantizedWeight) -> str | None:
            return None

        def __init__(self, module: QuantizedWeight) -> None:
            self.matrix, self.bias, self.integers = module.weight, module.bias, module.codes()

        def run(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.matrix, self.bias)

        def codes(self) -> Tensor:
            return self.integers

    try:
        module, x = layer("int3:channel", None), torch.randn(3, COLUMNS)
        expected = module(x)
        (choice,) = choose_kernels(nn.Sequential(module), "plain_matmul").choices
        assert choice.kernel == "plain_matmul" and torch.equal(module(x), expected)
        assert module._buffers["weight_packed"] is not None
    finally:
        del KERNELS._entries["plain_matmul"]


def test_a_kernel_that_does_not_run_where_the_module_moved_is_left(caplog: pytest.LogCaptureFixture) -> None:
    module, x = layer("int8:channel", "int8:token:dyn"), torch.randn(3, COLUMNS)
    expected = module(x)
    module.use_kernel(KERNELS.get("int4_cuda"))
    assert torch.equal(module(x), expected) and "int4_cuda left for the reference: not for cpu" in caplog.text
