"""Samples: a deterministic function of content, tokenizer and seed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wrapq.data.samples import POOL, Samples, build_samples, digest_of
from wrapq.data.sources.base import Source, make_source
from wrapq.data.tokenized import first_tokens
from wrapq.errors import CalibrationError

EOS, BOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word is one token: `w7` is token 9."""
    words = {"<eos>": EOS, "<bos>": BOS, **{f"w{i}": i + 2 for i in range(5000)}, "a": 5002}
    fast = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def bare(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, which puts nothing before a text."""
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", bos_token="<bos>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def jsonl(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return make_source("jsonl", {"path": str(path)})


def tokens(path: Path, ids: object) -> Source:
    np.save(path, np.asarray(ids))
    return make_source("tokens", {"path": str(path)})


def test_packing_joins_with_eos_and_drops_the_last_window(tmp_path, bare) -> None:
    source = jsonl(tmp_path / "a.jsonl", [words(0, 3), "  ", words(10, 4)])
    found = build_samples(source, bare, None, 4, seed=None)
    assert found.input_ids.tolist() == [[2, 3, 4, EOS], [12, 13, 14, 15]]
    assert found.attention_mask is None
    assert found.tokens == 8
    assert build_samples(source, bare, None, 3, seed=None).input_ids.tolist() == [[2, 3, 4], [EOS, 12, 13]]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("rendered", [False, True])
def test_every_sequence_begins_once_with_what_the_tokenizer_puts_there(tmp_path, tokenizer, pack, rendered) -> None:
    start = "<bos> " if rendered else ""  # as in a chat that a template has rendered
    source = jsonl(tmp_path / "a.jsonl", [start + words(0, 7), start + words(10, 9)])
    found = build_samples(source, tokenizer, None, 4, seed=None, pack=pack)
    assert (found.input_ids == BOS).sum(1).tolist() == [1] * len(found.input_ids)
    assert (found.input_ids[:, 0] == BOS).all()
    packed = [[BOS, 2, 3, 4], [BOS, 5, 6, 7], [BOS, 8, EOS, 12], [BOS, 13, 14, 15], [BOS, 16, 17, 18]]
    assert found.input_ids.tolist() == (packed if pack else [[BOS, 2, 3, 4], [BOS, 12, 13, 14]])


def test_as_many_first_tokens_as_the_tokenizer_has(tmp_path, tokenizer, bare) -> None:
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> <eos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    two = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", bos_token="<bos>")
    assert (first_tokens(bare), first_tokens(tokenizer), first_tokens(two)) == ([], [BOS], [BOS, EOS])
    source = jsonl(tmp_path / "a.jsonl", [words(0, 5)])
    assert build_samples(source, two, None, 4, seed=None).input_ids.tolist() == [[BOS, EOS, 2, 3], [BOS, EOS, 4, 5]]
    with pytest.raises(CalibrationError, match="seq_len=2 leaves no token after the 2 that the tokenizer begins with"):
        build_samples(source, two, None, 2, seed=None)


def test_the_same_text_is_tokenized_once(tmp_path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source, calls = jsonl(tmp_path / "a.jsonl", [words(0, 30), words(40, 4)]), []
    encode = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **kwargs: calls.extend([1] * isinstance(text, list)) or encode(self, text, **kwargs),
    )
    first, again = (build_samples(source, tokenizer, None, 5, seed=seed) for seed in (1, 1))
    assert (first.digest, len(calls)) == (again.digest, 1)
    again.input_ids.zero_()
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", bos_token="<bos>")
    assert build_samples(source, copy, None, 5, seed=1).digest == first.digest and len(calls) == 1
    build_samples(source, tokenizer, 2, 5, seed=None, pack=False)
    assert len(calls) == 2, "with special tokens"
    copy.add_tokens(["w3"])
    build_samples(source, copy, None, 5, seed=1, vocab_size=9999)
    assert len(calls) == 3, "another tokenizer"
    jsonl(tmp_path / "a.jsonl", [words(0, 30), words(41, 4)])
    assert build_samples(source, tokenizer, None, 5, seed=1).digest != first.digest and len(calls) == 4


def test_without_packing_rows_are_padded_on_the_right(tmp_path, tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", [words(0, 9), words(10, 2)])
    found = build_samples(source, tokenizer, 2, 5, seed=None, pack=False)
    assert found.input_ids.tolist() == [[BOS, 2, 3, 4, 5], [BOS, 12, 13, EOS, EOS]]
    assert found.attention_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert found.tokens == 8
    full = build_samples(source, tokenizer, 2, 3, seed=None, pack=False)
    assert full.attention_mask is None


def test_the_seed_chooses_and_the_choice_repeats(tmp_path, bare) -> None:
    source = jsonl(tmp_path / "a.jsonl", [words(0, 4000)])
    runs = [build_samples(source, bare, 8, 4, seed) for seed in (0, 0, 1)]
    assert runs[0].digest == runs[1].digest != runs[2].digest
    assert torch.equal(runs[0].input_ids, runs[1].input_ids)
    firsts = runs[0].input_ids[:, 0]
    assert len(firsts.unique()) == 8  # no window twice
    assert ((firsts - 2) % 4 == 0).all()  # each one a window of the cut


def test_only_the_pool_is_looked_at(tmp_path, tokenizer) -> None:
    start = [words(0, 100)] * (2 * POOL)
    short = build_samples(jsonl(tmp_path / "a.jsonl", start), tokenizer, 1, 4, 0)
    longer = build_samples(jsonl(tmp_path / "b.jsonl", [*start, words(500, 900)]), tokenizer, 1, 4, 0)
    assert short.digest == longer.digest


@pytest.mark.slow
def test_the_same_in_another_process(tmp_path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    source = jsonl(tmp_path / "a.jsonl", [words(0, 500), words(1000, 800)])
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast as T\n"
        "from wrapq.data.samples import build_samples; from wrapq.data.sources.base import make_source\n"
        "t = T.from_pretrained(sys.argv[2]); s = make_source('jsonl', {'path': sys.argv[1]})\n"
        "sys.stdout.write(build_samples(s, t, 6, 8, 3).digest)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "tok")]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert other == build_samples(source, tokenizer, 6, 8, 3).digest


def test_digest_depends_on_ids_shape_and_mask() -> None:
    ids = torch.arange(6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    digests = {
        digest_of(ids.view(2, 3), None),
        digest_of(ids.view(3, 2), None),
        digest_of(ids.view(2, 3) + 1, None),
        digest_of(ids.view(2, 3), mask),
        digest_of(ids.view(2, 3), ~mask),
    }
    assert len(digests) == 5


def test_fewer_windows_than_asked_is_a_note(tmp_path, tokenizer) -> None:
    found = build_samples(jsonl(tmp_path / "a.jsonl", [words(0, 20)]), tokenizer, 9, 8, 0)
    assert len(found.input_ids) == 2
    assert "gives 2 samples of 8 tokens, 9 were asked for" in found.notes[0]


def test_nothing_to_cut_is_an_error(tmp_path, bare) -> None:
    with pytest.raises(CalibrationError, match="7 tokens, fewer than one sample of seq_len=8"):
        build_samples(jsonl(tmp_path / "a.jsonl", [words(0, 7)]), bare, 1, 8, 0)
    with pytest.raises(CalibrationError, match="no text in it"):
        build_samples(jsonl(tmp_path / "b.jsonl", [" ", ""]), bare, 1, 8, 0)
    with pytest.raises(CalibrationError, match="samples=0"):
        build_samples(jsonl(tmp_path / "b.jsonl", ["x"]), bare, 0, 8, 0)


def test_token_rows_are_cut_as_they_are(tmp_path) -> None:
    source = tokens(tmp_path / "a.npy", [[1, 2, 3], [4, 5, 6]])
    assert build_samples(source, None, None, 2, None).input_ids.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert build_samples(source, None, None, 2, None, pack=False).input_ids.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize("ids", [[[1, 2], [3, 99]], [[1, 2], [3, -1]]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids) -> None:
    with pytest.raises(CalibrationError, match=r"token id (99|-1) is outside the vocabulary \(0 to 49\)"):
        build_samples(tokens(tmp_path / "a.npy", ids), None, None, 2, None, vocab_size=50)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(CalibrationError, match="tokenized for another model"):
        build_samples(jsonl(tmp_path / "a.jsonl", [words(0, 20)]), tokenizer, 1, 8, None, vocab_size=5)


def test_no_end_token_is_a_note(tmp_path, tokenizer) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    found = build_samples(jsonl(tmp_path / "a.jsonl", [words(0, 4), words(4, 4)]), without, None, 9, None)
    assert found.input_ids.tolist() == [[BOS, *range(2, 10)]]
    assert "no end-of-text token" in found.notes[0]


def test_batches() -> None:
    samples = Samples(torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool), "")
    assert [ids.tolist() for ids, _, _ in samples.batches(2)] == [[[0, 1], [2, 3]], [[4, 5]]]
    assert all(mask.shape == ids.shape for ids, mask, _ in samples.batches(2))


def test_demo_text_is_enough_for_the_default_recipe(tokenizer) -> None:
    source = make_source("demo")
    found = build_samples(source, tokenizer, 64, 256, 0)
    assert found.input_ids.shape == (64, 256)
    assert not found.notes
