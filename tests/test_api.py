"""prepare, the user's own loop, convert: on any module, all or nothing, and by name where something is wrong."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.conftest import build_model
from tests.contracts.wrapper import round_weights
from wrapq import PTQConfig, QuantSpec, convert, padding, prepare, restore
from wrapq.errors import CalibrationError, LifecycleError, PlanError, SpecError, UnknownNameError
from wrapq.runtime.module import QuantizedModule
from wrapq.wrappers.model import iter_quantizers, iter_wrapped
from wrapq.wrappers.quantizer import State

INT16 = PTQConfig(weight="int16:channel:sym", activations="int16:tensor:asym")


class SmallCNN(nn.Module):
    """Convolution, normalization that has no wrapper, one ReLU at two places, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.relu = nn.Conv2d(8, 4, 3, stride=2), nn.ReLU()
        self.head = nn.Linear(4 * 7 * 7, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(images)))
        return self.head(self.relu(self.conv2(x)).flatten(1))


def objects(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_a_linear_layer_is_a_model():
    layer, x = nn.Linear(32, 16).requires_grad_(False), torch.randn(4, 32)
    expected = layer(x)
    prepared = prepare(layer)
    prepared(x)
    converted = convert(prepared)
    assert isinstance(converted, nn.Linear) and isinstance(converted, QuantizedModule)
    assert 0 < relative(converted(x), expected) < 0.02
    assert set(converted.state_dict()) == {
        *("weight_packed", "weight_shape", "weight_scale", "bias"),
        *("input_scale", "input_zero_point"),
    }
    assert torch.equal(layer(x), expected)


def points(model: nn.Module) -> set[str]:
    return {quantizer.where for quantizer in iter_quantizers(model) if not quantizer.where.endswith(".weight")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_by_default_activation_is_what_matrix_products_with_weights_read(family: str):
    model = build_model(family)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert points(prepare(model, PTQConfig(weight=None))) == {f"{name}.input" for name in linears}


def test_convolutions_read_products_too_and_every_point_is_asked_for_by_name():
    few = points(prepare(SmallCNN()))
    every = points(prepare(SmallCNN(), INT16))
    assert few == {"conv1.input", "conv2.input", "head.input"}
    assert every == few | {"conv1.output", "conv2.output", "head.output", "relu.input", "relu.output"}


def test_activation_without_a_matrix_product_is_refused():
    with pytest.raises(PlanError, match=r"none of the 2 modules it matches .* matrix[\s\S]*activations"):
        prepare(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


def test_a_cnn():
    torch.manual_seed(0)
    net, x = SmallCNN().eval().requires_grad_(False), torch.randn(4, 3, 16, 16)
    expected = net(x)
    prepared = prepare(net, INT16)
    assert [name for name, _ in iter_wrapped(prepared)] == ["conv1", "conv2", "relu", "head"]
    assert torch.equal(prepared(x), expected)
    converted = convert(prepared)
    assert relative(converted(x), expected) < 1e-3
    assert isinstance(converted.norm, nn.BatchNorm2d)


def test_a_module_used_twice_observes_both_uses():
    net, x = SmallCNN().eval().requires_grad_(False), torch.randn(4, 3, 16, 16)
    seen = []
    net.relu.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].max())))
    prepared = prepare(net, INT16)
    prepared(x)
    _, high = prepared.relu.quantizers["input"].observer.range()
    assert len(seen) == 2 and float(high) == max(seen)


def test_strict_says_what_stays_untouched():
    with pytest.raises(PlanError, match=r"no wrapper for norm \(BatchNorm2d\)"):
        prepare(SmallCNN(), PTQConfig(strict=True))


def test_specs_are_texts_or_objects_and_none_leaves_float():
    spec = QuantSpec.parse("int4:g16:sym")
    model = prepare(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), PTQConfig(weight=spec, activation=None))
    assert [(q.where, q.spec) for q in iter_quantizers(model)] == [("0.weight", spec)]
    assert isinstance(convert(model)[0], QuantizedModule)


def test_overrides_go_from_general_to_particular():
    config = PTQConfig(
        activation=None,
        overrides={
            "*.mlp.*": {"weight": "int4:g32:sym"},
            "re:.*layers\\.1.*down_proj": {"weight": "float"},
            "lm_head": None,
        },
    )
    model = prepare(build_model("llama"), config)
    specs = {q.where: str(q.spec) for q in iter_quantizers(model)}
    assert specs["model.layers.0.mlp.down_proj.weight"] == "int4:g32:sym"
    assert specs["model.layers.0.self_attn.q_proj.weight"] == "int8:channel:sym"
    assert not {"model.layers.1.mlp.down_proj.weight", "lm_head.weight"} & set(specs)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (PTQConfig(overrides={"*.mlp.dwon_proj": None}), r"'\*\.mlp\.dwon_proj' matches no module"),
        (PTQConfig(overrides={"*.down_proj": {"wieght": "int4:channel"}}), r"has a point 'wieght'[\s\S]*weight"),
        (PTQConfig(weight="int4:g100:sym"), "group size 100 does not divide the width"),
        (PTQConfig(overrides={"model.layers.77": None}), "matches no module"),
        (PTQConfig(weight="int4:token:dyn"), "a weight does not change"),
        (PTQConfig(activations="int8:channel"), "channel@-1"),
        (PTQConfig(activations="int8:tensor:nosuch"), "unknown observer 'nosuch'"),
        (PTQConfig(activations="int8:tensor:percentile(percentil=9)"), "no option 'percentil'"),
    ],
    ids=["module", "point", "group size", "layer", "dynamic weight", "axis", "observer", "observer option"],
)
def test_a_refused_configuration_leaves_the_model_as_it_was(config: PTQConfig, match: str):
    model = build_model("llama")
    before, attention = objects(model), model.config._attn_implementation
    with pytest.raises(PlanError, match=match):
        prepare(model, config)
    assert objects(model) == before and model.config._attn_implementation == attention
    assert restore(prepare(model)) is model and objects(model) == before


@pytest.mark.parametrize("config", [PTQConfig(weight="w4"), PTQConfig(activations="int8:chanel")])
def test_a_spec_that_is_none_is_refused_before_anything(config: PTQConfig):
    model = build_model("llama")
    before = objects(model)
    with pytest.raises((SpecError, PlanError, ValueError), match=r"w4|chanel"):
        prepare(model, config)
    assert objects(model) == before


def test_all_mistakes_at_once():
    config = PTQConfig(weight="int4:g100:sym", overrides={"nothing": None, "*.down_proj": {"outptu": "int8:tensor"}})
    with pytest.raises(PlanError) as caught:
        prepare(build_model("llama"), config)
    assert len(caught.value.problems) >= 3


def test_converting_what_saw_no_data_changes_nothing():
    model = build_model("llama")
    prepared = prepare(model)
    before = objects(prepared)
    ids = torch.randint(3, 96, (2, 8))
    expected = prepared.model(input_ids=ids)  # all but lm_head
    with pytest.raises(LifecycleError, match=r"1 points are not ready:\n  lm_head\.input .* saw no data"):
        convert(prepared)
    assert objects(prepared) == before
    assert {quantizer.state for quantizer in iter_quantizers(prepared)} == {State.OBSERVING}
    assert torch.equal(prepared.model(input_ids=ids)[0], expected[0])
    prepared(input_ids=ids)
    convert(prepared)


def test_many_unready_points_are_counted_not_all_listed():
    with pytest.raises(LifecycleError, match="points are not ready") as caught:
        convert(prepare(build_model("llama")))
    assert len(str(caught.value).splitlines()) == 11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_refused_by_name(bad: float):
    prepared = prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    x = torch.randn(3, 8)
    x[0, 0] = bad
    prepared(x)
    with pytest.raises(CalibrationError, match=r"^0\.input: the data holds (NaN|inf)"):
        convert(prepared)
    assert not isinstance(prepared[0], QuantizedModule)


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1, 1] = float("nan")
    with pytest.raises(CalibrationError, match=r"^0\.weight: the data holds NaN"):
        convert(prepare(model, PTQConfig(activation=None)))


@pytest.mark.parametrize("rounding", ["no_such", "ranges"])
def test_rounding_must_be_an_algorithm_that_rounds(rounding: str):
    prepared = prepare(nn.Sequential(nn.Linear(8, 8)), PTQConfig(activation=None))
    with pytest.raises((UnknownNameError, LifecycleError), match=rounding):
        convert(prepared, rounding)
    assert {quantizer.state for quantizer in iter_quantizers(prepared)} == {State.OBSERVING}


def test_what_is_not_prepared():
    with pytest.raises(LifecycleError, match="not prepared: nothing to convert"):
        convert(nn.Linear(2, 2))
    with pytest.raises(LifecycleError, match="not prepared: nothing to restore"):
        restore(nn.Linear(2, 2))


def test_padding_keeps_padding_out():
    model, x = prepare(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 3, 4)
    x[0, 2], x[1, 1:] = 1e6, -1e6
    with padding(torch.tensor([[1, 1, 0], [1, 0, 0]])):
        model(x)
    low, high = model[0].quantizers["input"].observer.range()
    real = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    assert (float(low), float(high)) == (float(real.min()), float(real.max()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1)])
def test_the_smallest_batches(shape: tuple[int, int]):
    model = prepare(build_model("llama"), INT16)
    ids = torch.randint(3, 96, shape)
    expected = model(input_ids=ids).logits
    assert relative(convert(model)(input_ids=ids).logits, expected) < 2e-3


class TestTiedEmbeddings:
    def test_one_spec_for_both_shares_the_tensors(self):
        model = build_model("llama", tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        prepared = prepare(model)
        prepared(input_ids=torch.randint(3, 96, (2, 8)))
        round_weights(prepared)
        integers = [m.quantizers["weight"].integers for m in (prepared.lm_head, prepared.model.embed_tokens)]
        assert integers[0] is integers[1]
        converted = convert(prepared)
        assert converted.lm_head.weight_packed is converted.model.embed_tokens.weight_packed
        assert converted.lm_head.weight_scale is converted.model.embed_tokens.weight_scale

    @pytest.mark.parametrize("point", [None, {"weight": "int4:g32:sym"}, {"weight": "float"}])
    def test_different_specs_are_refused_with_the_reason(self, point: dict[str, str] | None):
        model = build_model("llama", tie_word_embeddings=True)
        before = objects(model)
        with pytest.raises(PlanError, match=r"one tied tensor, but [\s\S]*give them the same weight spec"):
            prepare(model, PTQConfig(overrides={"lm_head": point}))
        assert objects(model) == before

    def test_neither_is_fine(self):
        model = build_model("llama", tie_word_embeddings=True)
        prepared = prepare(model, PTQConfig(overrides={"lm_head": None, "embed_tokens": None}))
        prepared(input_ids=torch.randint(3, 96, (2, 8)))
        converted = convert(prepared)
        assert converted.lm_head.weight is converted.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PTQConfig(None, None), "PTQConfig: quantizes nothing"),
        (PTQConfig(None, None, {"0": None}), "PTQConfig: quantizes nothing"),
        (PTQConfig(overrides={"": None}), "PTQConfig.overrides: '' is no pattern"),
        (PTQConfig(overrides={"0": "int8"}), "'0': 'int8' should be a mapping from points to specs, or None"),
        (PTQConfig(activation="int8:token:dyn", activations="int16:tensor"), "takes its place[\\s\\S]*one of them"),
        (PTQConfig("int44"), "PTQConfig.weight: unknown dtype 'int44'"),
        (PTQConfig(overrides={"0": {"input": "int4:g8:!"}}), r"PTQConfig.overrides\['0'\].input: "),
    ],
)
def test_a_config_that_says_nothing_or_nonsense_is_refused(config: PTQConfig, said: str):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(PlanError, match=said):
        prepare(model, config)
    assert type(model[0]) is nn.Linear


def test_overrides_alone_quantize_what_they_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prepared = prepare(model, PTQConfig(None, None, {"1": {"weight": "int8:channel", "input": None}}))
    assert [name for name, _ in iter_wrapped(prepared)] == ["1"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("int8:channel@-1", "that axis of input is as long as the data: use channel@-3, or tensor"),
        ("int8:channel@1", "use channel@-3"),
        ("int8:g8", "the last axis of input is as long as the data, so it has no groups"),
        ("int8:head", "one scale for each attention head"),
    ],
)
def test_images_have_their_channels_before_their_sides(spec: str, said: str):
    with pytest.raises(PlanError, match=said):
        prepare(SmallCNN(), PTQConfig(None, None, {"conv1": {"input": spec}}))


def test_one_range_for_each_channel_of_images():
    prepared = prepare(SmallCNN().eval(), PTQConfig(None, None, {"conv1": {"input": "int8:channel@-3"}}))
    prepared(torch.randn(2, 3, 16, 16))
    assert convert(prepared).conv1.input_scale.shape == (1, 3, 1, 1)
