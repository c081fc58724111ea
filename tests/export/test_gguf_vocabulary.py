"""Tokenizers in a GGUF file: what is written of them, which are refused, and that llama.cpp makes the same tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import build_model
from tests.models import DEMO
from wrapq.errors import ModelError
from wrapq.export.gguf.vocabulary import _PATTERNS, vocabulary
from wrapq.export.gguf.writer import write_gguf

gguf = pytest.importorskip("gguf")

CORPUS = [*(DEMO / "calib.txt").read_text().splitlines()[:1500], "It's 1234 files, we'll read them. Naïve café: 你好"]
TEXTS = (
    (DEMO / "heldout.txt").read_text()[:2000],
    "  It's 12345 FILES,\n\n\n\twe'll   read them:  naïve café, 你好 🙂 <0x41> ▁ \r\n x",
    "<s>one</s> two<unused>  three",
    " ",
    "",
)
SIZE = 600


def byte_level(pattern: str | None, **more: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text by `pattern`, or by that of GPT-2."""
    made = Tokenizer(models.BPE(**more))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, whole]) if split else whole
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 1, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<unused>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def pieces(prefix: bool, bos: bool = True, first: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as transformers has it: pieces by their scores, and all merges that make them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=SIZE - 300, limit_alphabet=120))
    found = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    texts = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256)), *(text for text, _ in found)]
    vocab = {text: i for i, text in enumerate(texts)}
    merges = [
        (text[:i], text[i:])
        for text, _ in found
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    if first:  # as newer files of Llama have it
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    made.add_tokens([AddedToken("<unused>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def written(tokenizer: Any, folder: Path) -> Path:
    """A tiny model's file with this tokenizer."""
    model = build_model("llama", vocab_size=len(tokenizer) + 3)
    write_gguf(model, tokenizer, folder / "model.gguf", "test", torch.float32)
    return folder / "model.gguf"


def fields(path: Path) -> dict[str, Any]:
    found = gguf.GGUFReader(path).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in found.items()}


MAKERS = {
    "gpt-2": lambda: byte_level(None),
    **{name: lambda key=key: byte_level(key[0], ignore_merges=key[1]) for key, name in _PATTERNS.items()},
    "default": lambda: pieces(prefix=True),
    "default at the start": lambda: pieces(prefix=False, first=True),
    "default without a space": lambda: pieces(prefix=False, bos=False),
}


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level(None)
    tokenizer.chat_template = "{{ messages }}"
    found = fields(written(tokenizer, tmp_path))
    assert (found["model"], found["pre"], found["add_bos_token"], found["eos_token_id"]) == ("gpt2", "gpt-2", False, 1)
    assert len(found["merges"]) == len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])
    kinds = {text: gguf.TokenType(kind).name for text, kind in zip(found["tokens"], found["token_type"], strict=True)}
    assert (kinds["<s>"], kinds["<unused>"], kinds["Ġ"]) == ("CONTROL", "USER_DEFINED", "NORMAL")
    assert found["tokens"][-3:] == [f"[PAD{len(tokenizer) + i}]" for i in range(3)]
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    found = fields(written(pieces(prefix=True), tmp_path))
    assert (found["model"], found["add_bos_token"], found["add_space_prefix"]) == ("llama", True, True)
    kinds = {text: gguf.TokenType(kind).name for text, kind in zip(found["tokens"], found["token_type"], strict=True)}
    assert (kinds["<unk>"], kinds["<0x0A>"], kinds["</s>"], kinds["▁the"]) == ("UNKNOWN", "BYTE", "CONTROL", "NORMAL")
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    assert scores["▁t"] > scores["▁the"]


def test_the_patterns_are_those_of_the_families() -> None:
    for name, make in MAKERS.items():
        found = vocabulary(make())
        assert (found.pattern or "default") == name.split(" ")[0]


def changed(tokenizer: Any, **sections: Any) -> Any:
    """The tokenizer with other sections in its file; `model` changes keys of its own."""
    now = json.loads(tokenizer.backend_tokenizer.to_str())
    now["model"] |= sections.pop("model", {})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(now | sections)))


def test_what_llama_cpp_does_not_split_so_is_refused() -> None:
    shipped = AutoTokenizer.from_pretrained(DEMO)
    assert vocabulary(shipped).pattern == "gpt-2"
    cases = {
        "puts no space before a text": changed(
            shipped, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        ),
        "the tokenizer has Lowercase": changed(shipped, normalizer={"type": "Lowercase"}),
        "to have the pattern by which the tokenizer splits text": byte_level(r"\w+|\s+|."),
        "neither byte-level nor falls back to bytes": changed(shipped, pre_tokenizer={"type": "Whitespace"}),
        "of kind WordLevel": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
        "has no continuing_subword_prefix": PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(continuing_subword_prefix="##"))
        ),
        "not in the order of the pieces": shuffled(pieces(prefix=True)),
        "are not all that make its pieces": changed(pieces(prefix=True), model=fewer(pieces(prefix=True))),
    }
    for reason, tokenizer in cases.items():
        with pytest.raises(ModelError, match=reason):
            vocabulary(tokenizer)


def fewer(tokenizer: Any) -> dict[str, Any]:
    """The merges without one of a piece that two merges make."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    at = next(i for i, (one, two) in enumerate(pairwise(merges)) if "".join(one) == "".join(two))
    return {"merges": merges[:at] + merges[at + 1 :]}


def shuffled(tokenizer: Any) -> Any:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    at = next(i for i, (one, two) in enumerate(pairwise(merges)) if "".join(one) == "".join(two))
    return changed(tokenizer, model={"merges": [*merges[:at], *merges[at + 1 :], merges[at]]})


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = MAKERS[name]()
    model = llama_cpp.Llama(str(written(tokenizer, tmp_path)), vocab_only=True, verbose=False)
    # there llama.cpp puts a space after special tokens and before spaces too, as SentencePiece does
    for text in TEXTS if name != "default at the start" else (TEXTS[0], TEXTS[1].strip()):
        assert model.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == bare, text
