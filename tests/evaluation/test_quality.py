"""Quality measures against plain formulas, the hand-written perplexity script, and edge cases."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from wrapq.errors import CalibrationError
from wrapq.evaluation.quality import LayerErrorMeter, QualityMeter
from wrapq.metrics import SQNR_CEILING

SHARED = Path(__file__).parents[2].parent / "shared"


def batch(seed: int, b: int = 3, t: int = 11, v: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(b, t, v, generator=g) * 3
    return ref, ref + torch.randn(b, t, v, generator=g), torch.randint(0, v, (b, t), generator=g)


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_plain_formulas(rows: int, dtype: torch.dtype) -> None:
    meter = QualityMeter(rows)
    nll, kl, agreed = [], [], []
    for seed in (0, 1):
        ref, logits, ids = batch(seed)
        ref, logits = ref.to(dtype), logits.to(dtype)
        meter.update(ref, logits, ids)
        p, q = (x[:, :-1].double().log_softmax(-1) for x in (ref, logits))
        nll.append(F.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        kl.append((p.exp() * (p - q)).sum(-1).flatten())
        agreed.append((p.argmax(-1) == q.argmax(-1)).double().flatten())
    found = meter.result()
    assert found["tokens"] == 2 * 3 * 10
    assert found["nll"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(torch.cat(agreed).mean().item())


def test_padding_does_not_count() -> None:
    ref, logits, ids = batch(0, b=2, t=8)
    mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4])  # what the fifth token predicts is padding
    logits[1, 5:], ref[1, 5:] = float("nan"), float("inf")
    padded, cut = QualityMeter(3), QualityMeter()
    padded.update(ref, logits, ids, mask)
    cut.update(ref[:1], logits[:1], ids[:1])
    cut.update(ref[1:, :5], logits[1:, :5], ids[1:, :5])
    assert padded.result() == pytest.approx(cut.result())
    assert padded.result()["tokens"] == 7 + 4


def test_equal_logits() -> None:
    ref, _, ids = batch(0)
    meter = QualityMeter()
    meter.update(ref, ref, ids)
    assert meter.result()["kl"] == 0
    assert meter.result()["top1_agreement"] == 1


def test_words_of_probability_zero_add_nothing() -> None:
    ref, logits, ids = batch(0)
    ids = ids.clamp(max=15)
    ref[..., 16] = logits[..., 16] = -math.inf
    meter = QualityMeter()
    meter.update(ref, logits, ids)
    assert math.isfinite(meter.result()["kl"])


def test_without_reference_there_is_no_kl() -> None:
    _, logits, ids = batch(0)
    meter = QualityMeter()
    meter.update(None, logits, ids)
    assert set(meter.result()) == {"perplexity", "nll", "tokens"}
    with pytest.raises(ValueError, match="every batch"):
        meter.update(logits, logits, ids)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no token to predict"):
        QualityMeter().result()
    meter = QualityMeter()
    meter.update(None, torch.zeros(2, 1, 5), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(CalibrationError, match="no token to predict"):
        meter.result()


def test_shapes_must_belong_together() -> None:
    _, logits, ids = batch(0)
    with pytest.raises(ValueError, match="do not belong"):
        QualityMeter().update(None, logits[:, 1:], ids)


def test_nan_and_hopeless_logits_are_not_hidden() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    meter = QualityMeter()
    meter.update(None, torch.full((1, 3, 4), float("nan")), ids)
    assert math.isnan(meter.result()["perplexity"])
    logits = torch.zeros(1, 3, 4)
    logits[..., 0] = -1e6
    meter = QualityMeter()
    meter.update(None, logits, ids)
    assert meter.result()["perplexity"] == math.inf


@pytest.mark.skipif(not (SHARED / "models" / "tiny-llama-docs").is_dir(), reason="needs ../shared/models")
def test_perplexity_is_that_of_the_hand_written_script() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wrapq.data.samples import build_samples
    from wrapq.data.sources.base import make_source

    loader = importlib.util.spec_from_file_location("ppl", SHARED / "bench" / "ppl.py")
    script = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(script)
    folder, text = SHARED / "models" / "tiny-llama-docs", SHARED / "data" / "test.txt"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = build_samples(make_source("text", {"path": str(text)}), tokenizer, 8, 256, seed=None)
    expected = script.perplexity(model, script.load_ids(tokenizer, text, 8 * 256), 256, 4)
    meter = QualityMeter(100)
    with torch.no_grad():
        for ids, _, _ in samples.batches(4):
            meter.update(None, model(input_ids=ids, use_cache=False).logits, ids)
    found = meter.result()
    assert found["tokens"] == expected["predicted"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected["ppl"], rel=1e-6)


def test_layer_errors_over_batches() -> None:
    ref, x, _ = batch(0)
    meter = LayerErrorMeter()
    for part in (slice(0, 2), slice(2, 3)):
        meter.update("b", ref[part], x[part])
    meter.update("a", ref, ref)
    rows = meter.result()
    assert list(rows) == ["b", "a"]
    error = ((ref - x).double().norm() / ref.double().norm()).item()
    assert rows["b"].relative_error == pytest.approx(error, rel=1e-6)
    assert rows["b"].sqnr_db == pytest.approx(-20 * math.log10(error), rel=1e-6)
    assert rows["b"].cosine == pytest.approx(F.cosine_similarity(ref.flatten(), x.flatten(), dim=0).item(), rel=1e-5)
    assert (rows["a"].relative_error, rows["a"].sqnr_db, rows["a"].cosine) == (0.0, math.inf, 1.0)
    curves = meter.curves("w4/")
    assert curves["w4/sqnr_db"] == [rows["b"].sqnr_db, SQNR_CEILING]
    assert set(curves) == {"w4/relative_error", "w4/sqnr_db", "w4/cosine"}


def test_layer_error_leaves_padding_out() -> None:
    ref, x, _ = batch(0, b=1, t=6)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    x[:, 4:] = float("nan")
    meter = LayerErrorMeter()
    meter.update(0, ref, x, mask)
    error = (ref - x)[:, :4].norm() / ref[:, :4].norm()
    assert meter.result()[0].relative_error == pytest.approx(error.item(), rel=1e-5)


def test_layer_error_edge_cases() -> None:
    zero, one = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    meter = LayerErrorMeter()
    meter.update("zero signal", zero, one)
    meter.update("zero output", one, zero)
    meter.update("both zero", zero, zero)
    meter.update("nan", one, one * float("nan"))
    rows = meter.result()
    assert rows["zero signal"].sqnr_db == -math.inf
    assert rows["zero output"].sqnr_db == 0
    assert rows["both zero"].sqnr_db == math.inf
    assert math.isnan(rows["nan"].sqnr_db)
    with pytest.raises(ValueError, match="differ in shape"):
        meter.update("x", zero, one[0])
