"""The walk: to the bit what running the model again for each point gives, at the price of one forward a batch."""

import copy
import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from tests.calibration.conftest import gptq_walker
from tests.conftest import KINDS, build_model
from wrapq import PTQConfig, convert, prepare, restore
from wrapq.algorithms.base import Rounded
from wrapq.algorithms.gptq import GPTQ, GPTQOptions
from wrapq.algorithms.ranges import Ranges
from wrapq.algorithms.rtn import RTN
from wrapq.calibration.assignments import Assignments
from wrapq.calibration.walker import Walker
from wrapq.errors import CalibrationError, LifecycleError
from wrapq.graph.blocks import Batch
from wrapq.observers.base import OBSERVERS
from wrapq.observers.forward_context import ForwardContext, forward_context, in_context
from wrapq.observers.minmax import MinMax
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Options
from wrapq.statistics.input import InputStatistics
from wrapq.wrappers.model import convert_model, iter_quantizers, iter_wrapped
from wrapq.wrappers.quantizer import Quantizer, State, WeightQuantizer

COARSE = PTQConfig(weight="int4:channel:sym", activations="uint5:tensor:asym")
"""Few bits, so that what is quantized earlier shows in all that comes later."""


def walker(model: nn.Module) -> Walker:
    names = [quantizer.where for quantizer in iter_quantizers(model)]
    return Walker(model, Assignments(dict.fromkeys(names, RTN()), dict.fromkeys(names, Ranges())))


def as_batches(tokens: list[Tensor]) -> list[Batch]:
    return [Batch({"input_ids": ids, "use_cache": False}) for ids in tokens]


def activations(model: nn.Module) -> dict[str, Quantizer]:
    return {q.where: q for q in iter_quantizers(model) if not isinstance(q, WeightQuantizer)}


def parameters(model: nn.Module) -> dict[str, str]:
    """The digest of the parameters of each static point."""
    return {q.where: q.qparams.digest() for q in iter_quantizers(model) if not q.spec.dynamic}


class Order:
    """A stream that writes down which points it comes to."""

    quantizes = True

    def __init__(self) -> None:
        self.met: list[Quantizer] = []

    def on_activation(self, point: Quantizer, x: Tensor) -> None:
        self.met.append(point)

    def on_weight_input(self, module: nn.Module, raw: Tensor, x: Tensor) -> None:
        pass


def execution_order(model: nn.Module, batch: Batch) -> list[Quantizer]:
    stream = Order()
    with in_context(calibration=stream):
        model(**batch.inputs)
    return stream.met


@torch.no_grad()
def literal_reference(model: nn.Module, batches: list[Batch]) -> None:
    """What `sequential` means, word for word: each point in turn sees all batches with everything before it fixed."""
    order = execution_order(model, batches[0])
    for _, module in iter_wrapped(model):
        if (weight := module.weight_quantizer) is not None:
            weight.set_rounded(*RTN().round(module.float_matrix(), weight.spec, weight.where)[:2])
    for quantizer in iter_quantizers(model):
        if quantizer.spec.dynamic:
            quantizer.freeze()
    for quantizer in order:
        quantizer.observe()
        for batch in batches:
            with in_context(padding=batch.mask):
                model(**batch.inputs)
        quantizer.freeze()


@pytest.mark.parametrize("family", KINDS)
def test_sequential_is_the_literal_reference_to_the_bit(family: str, token_batches: list[Tensor], threads: None):
    overrides = {"lm_head": None} if family in ("llama", "mistral") else {}
    config = PTQConfig(weight=COARSE.weight, activation=COARSE.activation, overrides=overrides)
    walked, reference = prepare(build_model(family), config), prepare(build_model(family), config)
    batches = as_batches(token_batches)
    if family == "bert":
        batches = [Batch({"input_ids": ids}) for ids in token_batches]
    literal_reference(reference, batches)
    walker(walked).run(batches, "sequential")
    assert parameters(walked) == parameters(reference)


def test_sequential_with_padding_dynamic_points_and_float_weights(token_batches: list[Tensor], threads: None):
    config = PTQConfig(
        weight=None,
        activation=COARSE.activation,
        overrides={"*.mlp": {"mul": "int4:token:dyn"}, "*.o_proj": {"weight": "int3:channel"}},
    )
    batches = []
    for ids in token_batches:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, 4:] = False
        batches.append(Batch({"input_ids": ids, "attention_mask": mask, "use_cache": False}, mask))
    walked, reference = prepare(build_model("qwen3"), config), prepare(build_model("qwen3"), config)
    literal_reference(reference, batches)
    walker(walked).run(batches, "sequential")
    assert parameters(walked) == parameters(reference)
    assert forward_context() == ForwardContext()


def test_what_comes_before_matters(token_batches: list[Tensor]):
    """Otherwise the tests above would prove nothing."""
    sequential, parallel = prepare(build_model("llama"), COARSE), prepare(build_model("llama"), COARSE)
    walker(sequential).run(as_batches(token_batches), "sequential")
    walker(parallel).run(as_batches(token_batches), "parallel")
    same = [w for w, digest in parameters(parallel).items() if parameters(sequential)[w] == digest]
    assert len(same) < len(parameters(parallel)) / 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["all static", "with dynamic points"])
def test_parallel_is_the_users_loop(dynamic: bool, token_batches: list[Tensor]):
    overrides = {"*.mlp": {"mul": "int3:token:dyn"}} if dynamic else {}
    config = PTQConfig(weight="int4:channel:sym", activations="uint5:tensor:asym", overrides=overrides)
    walked, looped = prepare(build_model("llama"), config), prepare(build_model("llama"), config)
    walker(walked).run(as_batches(token_batches), "parallel")
    for ids in token_batches:
        looped(input_ids=ids)
    expected, got = convert(looped).state_dict(), convert_model(walked).state_dict()
    assert set(got) == set(expected) and all(torch.equal(got[name], expected[name]) for name in got)


def test_parallel_does_not_mind_the_order_and_the_size_of_batches(threads: None):
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(2))
    ways = [list(ids.split(1)), list(ids.split(1))[::-1], list(ids.split([3, 1])), [ids]]
    ranges = []
    for way in ways:
        model = prepare(build_model("llama"), COARSE)
        run = walker(model)
        run.run(as_batches(way), "parallel")
        ranges.append(run.result.statistics)
    for other in ranges[1:]:
        assert set(other) == set(ranges[0])
        for name, value in other.items():
            torch.testing.assert_close(value, ranges[0][name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, ranges[0][name]) for name, value in ranges[1].items())


def test_twice_the_same_is_the_same(token_batches: list[Tensor]):
    models = [prepare(build_model("mistral"), COARSE) for _ in range(2)]
    for model in models:
        walker(model).run(as_batches(token_batches), "sequential")
    assert parameters(models[0]) == parameters(models[1])


class Counting(MinMax):
    """A real observer that also counts its updates."""

    def __init__(self, spec: QuantSpec, options: Options | None = None) -> None:
        super().__init__(spec, options)
        self.updates = 0

    def update(self, x: Tensor) -> None:
        self.updates += 1
        super().update(x)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> PTQConfig:
    sorted(OBSERVERS)  # so that all are loaded
    monkeypatch.setitem(OBSERVERS._entries, "counting", Counting)
    return PTQConfig(activations="uint8:tensor:asym:counting")


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_each_point_observes_each_batch_once(schedule: str, counting: PTQConfig, token_batches: list[Tensor]):
    model = prepare(build_model("qwen3"), counting)
    observers = {where: quantizer.observer for where, quantizer in activations(model).items()}
    walker(model).run(as_batches(token_batches), schedule)
    assert {where: observer.updates for where, observer in observers.items()} == dict.fromkeys(observers, 3)
    assert all(quantizer.observer is None for quantizer in activations(model).values())
    model(input_ids=token_batches[0])
    assert {observer.updates for observer in observers.values()} == {3}


def test_each_batch_runs_each_block_once_and_nothing_after_the_last_open_point(token_batches: list[Tensor]):
    model = build_model("llama")
    calls = dict.fromkeys(["model.layers.0", "model.layers.1", "lm_head"], 0)
    for name in calls:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    prepared = prepare(model, PTQConfig(overrides={"lm_head": None, "model.norm": None}))
    walker(prepared).run(as_batches(token_batches), "sequential")
    assert calls == {"model.layers.0": 3, "model.layers.1": 3, "lm_head": 0}


def test_without_static_activations_no_batch_runs():
    model = prepare(build_model("llama"), PTQConfig(activations="int8:token:dyn"))
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    walker(model).run([], "sequential")
    assert not calls and {quantizer.state for quantizer in iter_quantizers(model)} == {State.QUANTIZED}


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize("overrides", [{}, {"lm_head": None, "model.norm": None}, {"model.layers.1": None}])
def test_progress_comes_to_its_end(schedule: str, overrides: dict, token_batches: list[Tensor]):
    ticks = []
    model = prepare(build_model("llama"), PTQConfig(overrides=overrides))
    run = walker(model)
    count, _ = run.steps()
    run.run(as_batches(token_batches), schedule, lambda: ticks.append(1))
    assert len(ticks) == count == 2


def alive() -> list[greenlet]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is greenlet and o.parent is not None and o and not o.dead]


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_an_exception_in_a_forward_leaves_nothing_behind(schedule: str, token_batches: list[Tensor]):
    model = build_model("llama")
    expected = model(input_ids=token_batches[0]).logits
    prepared = prepare(model, COARSE)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = prepared.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        walker(prepared).run(as_batches(token_batches), schedule)
    hook.remove()
    assert not alive() and forward_context() == ForwardContext()
    assert not prepared.model.layers[0]._forward_pre_hooks and not prepared.model.layers[1]._forward_pre_hooks
    prepared(input_ids=token_batches[0])
    assert torch.equal(restore(prepared)(input_ids=token_batches[0]).logits, expected)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(schedule: str, bad: float, token_batches: list[Tensor]):
    prepared = prepare(build_model("llama"), COARSE)

    def spoil(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 1, 2] = bad
        return output

    # the points of the module itself have passed when its hook runs: the first to see it is the next one
    prepared.model.layers[1].input_layernorm.register_forward_hook(spoil)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.\S+: the data holds (NaN|inf)"):
        walker(prepared).run(as_batches(token_batches), schedule)
    assert not alive()


class Experts(nn.Module):
    """A mixture: a batch goes to the experts that its first element names, then through what is common to all."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.common = nn.Linear(8, 8)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        h = self.gate(x)
        for index in chosen:
            h = h + self.experts[index](h)
        return self.common(h)


def expert_batches(*chosen: tuple[int, ...]) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        Batch({"x": torch.randn(2, 3, 8, generator=generator) * (i + 1), "chosen": c}) for i, c in enumerate(chosen)
    ]


def sequential_batches() -> Iterator[list[Batch]]:
    yield expert_batches((0,), (0, 1), (2, 3))
    yield expert_batches((3,), (1, 2), (0,), (0, 1, 2, 3))
    yield expert_batches((0, 2), (1, 3), (0, 3))


@pytest.mark.parametrize("batches", sequential_batches(), ids=["apart", "one takes all", "crossing"])
def test_batches_that_part_ways_decide_each_expert_by_those_who_came(batches: list[Batch]):
    model = prepare(Experts(), COARSE)
    arrived: dict[str, int] = {}
    for where, quantizer in activations(model).items():
        quantizer.observer = Tally(quantizer.spec, where, arrived)
    walker(model).run(batches, "sequential")
    expected = {
        f"experts.{i}.{point}": sum(i in b.inputs["chosen"] for b in batches)
        for i in range(4)
        for point in ("input", "output")
    }
    together = {f"{name}.{point}": len(batches) for name in ("gate", "common") for point in ("input", "output")}
    assert arrived == expected | together


class Tally(MinMax):
    """A real observer that also writes down how many batches came."""

    def __init__(self, spec: object, where: str, arrived: dict[str, int]) -> None:
        super().__init__(spec)
        self.where, self.arrived = where, arrived

    def update(self, x: Tensor) -> None:
        self.arrived[self.where] = self.arrived.get(self.where, 0) + 1
        super().update(x)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_an_expert_nobody_came_to_has_the_widest_range_of_the_others(schedule: str):
    model = prepare(Experts(), COARSE)
    decided = walker(model)
    decided.run(expert_batches((0, 1), (1, 3)), schedule)
    points = {where: quantizer for where, quantizer in activations(model).items() if where.startswith("experts.")}
    for point in ("input", "output"):
        others = {f"experts.{i}.{point}": float(points[f"experts.{i}.{point}"].scale) for i in (0, 1, 3)}
        widest = max(others, key=others.__getitem__)
        assert float(points[f"experts.2.{point}"].scale) == others[widest]
        assert f"experts.2.{point}: no token came to it; it has the range of {widest}" in decided.result.fallbacks
    nobody = prepare(nn.Sequential(nn.Linear(4, 4)), COARSE)
    with pytest.raises(LifecycleError, match=r"0\.input .* saw no data"):
        walker(nobody).run([], schedule)


class Block(nn.Module):
    """A layer with a mixture inside, whose own sum comes after it although it is the outer module."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Experts(3)
        self.sum = nn.Identity()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        return self.norm(x + self.mlp(x, chosen=chosen))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        for layer in self.layers:
            x = layer(x=x, chosen=chosen)
        return self.head(x)


class Reused(nn.Module):
    """One activation at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x))) * 10))


def test_a_module_that_runs_twice_cannot_be_decided_at_its_first_use():
    batches = [Batch({"x": torch.randn(2, 8)}) for _ in range(2)]
    model = prepare(Reused(), COARSE)
    with pytest.raises(CalibrationError, match=r"act runs more than once .* calibration\.schedule=parallel"):
        walker(model).run(batches, "sequential")
    model = prepare(restore(model), COARSE)
    walker(model).run(batches, "parallel")
    weights_only = prepare(Reused(), PTQConfig(overrides={"act": None}))
    walker(weights_only).run(batches, "sequential")


def test_mixtures_in_blocks_meet_again_after_each_block():
    model = prepare(Mixture(), COARSE)
    arrived: dict[str, int] = {}
    for where, quantizer in activations(model).items():
        quantizer.observer = Tally(quantizer.spec, where, arrived)
    walker(model).run(expert_batches((0,), (0, 1), (2,)), "sequential")
    for index in range(2):
        assert {arrived[f"layers.{index}.{name}.input"] for name in ("norm", "mlp.gate", "mlp.common")} == {3}
        assert [arrived[f"layers.{index}.mlp.experts.{i}.input"] for i in range(3)] == [2, 1, 1]
    assert arrived["head.output"] == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cross_term_is_of_the_float_and_the_quantized_model(family: str, token_batches: list[Tensor]):
    """With the last weight's input taken from the two models themselves."""
    config = PTQConfig(weight="int3:channel:sym", activation=None)
    model, original = prepare(build_model(family), config), build_model(family)
    gathered: dict[str, InputStatistics] = {}

    class Keeping(GPTQ):
        def round(self, weight: Tensor, spec: object, where: str, statistics: InputStatistics | None = None) -> Rounded:
            gathered[where] = statistics
            return super().round(weight, spec, where, statistics)

    gptq_walker(model, Keeping(GPTQOptions(asymmetric=0.5))).run(as_batches(token_batches), "sequential")
    last = "model.layers.1.mlp.down_proj" if family == "llama" else "transformer.h.1.mlp.c_proj"
    inputs: dict[int, list[Tensor]] = {0: [], 1: []}
    for index, net in enumerate((original, model)):
        hook = net.get_submodule(last).register_forward_pre_hook(
            lambda module, args, index=index: inputs[index].append(args[0].flatten(0, 1))
        )
        for ids in token_batches:
            net(input_ids=ids, use_cache=False)
        hook.remove()
    f, x = (torch.cat(inputs[index]).detach() for index in (0, 1))
    assert (f - x).abs().max() > 1e-3
    torch.testing.assert_close(gathered[f"{last}.weight"].sums["cross"], (f - x).t() @ x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gathered[f"{last}.weight"].sums["hessian"], x.t() @ x, rtol=1e-3, atol=1e-4)


class Twice(nn.Module):
    """A model that goes through its blocks two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for layer in self.layers:
                x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("rounder", [RTN, GPTQ])
def test_parallel_waits_for_the_end_where_blocks_run_again(rounder: type, threads: None):
    torch.manual_seed(0)
    net = Twice()
    batches = [Batch({"x": torch.randn(4, 8) * (i + 1)}) for i in range(3)]
    walked, looped = (prepare(copy.deepcopy(net), COARSE) for _ in range(2))
    run = gptq_walker(walked, rounder())
    run.run(batches, "parallel")
    for batch in batches:
        looped(**batch.inputs)
    expected = convert(looped)
    for where, quantizer in activations(walked).items():
        name, _, point = where.rpartition(".")
        assert torch.equal(quantizer.scale, expected.get_submodule(name).qparams(point).scale)
    if rounder is GPTQ:
        assert {report["rows"] for report in run.result.reports.values()} == {2 * 3 * 4}


def test_a_model_without_blocks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).eval()
    batches = [Batch({"input": torch.randn(3, 1, 8, 8)}) for _ in range(3)]
    walked, reference = (prepare(copy.deepcopy(net), COARSE) for _ in range(2))
    walker(walked).run(batches, "sequential")
    literal_reference(reference, batches)
    assert parameters(walked) == parameters(reference)
    x = batches[0].inputs["input"]
    fake = walked(x)
    assert torch.equal(convert_model(walked)(x), fake)


@pytest.mark.bench
def test_cost_of_calibration(capsys: pytest.CaptureFixture):
    """How much slower calibrating is than the float forward; a number to look at, not to assert."""
    changes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 128}
    ids = list(torch.randint(3, 96, (8, 4, 64)))

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    with torch.no_grad():
        model = build_model("llama", **changes)
        seconds(lambda: [model(input_ids=i) for i in ids])
        floats = seconds(lambda: [model(input_ids=i) for i in ids])
        for schedule in ("parallel", "sequential"):
            prepared = prepare(build_model("llama", **changes))
            points = len(list(iter_quantizers(prepared)))
            spent = seconds(lambda p=prepared, s=schedule: walker(p).run(as_batches(ids), s))
            with capsys.disabled():
                print(f"{schedule}: {spent / floats:.2f} x the float forward ({floats:.2f} s), {points} points")
