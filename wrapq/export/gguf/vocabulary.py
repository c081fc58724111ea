"""Tokenizers as llama.cpp has them: byte-level BPE with the pattern that splits text, by name; and SentencePiece's BPE,
by the scores of its pieces.

The patterns and their names are those of llama.cpp's `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wrapq.errors import ModelError

_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_WORDS = rf"{_BEFORE}\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
_CASED_SHORT = f"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?"
_PATTERNS = {
    (rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}", False): "qwen2",
    (rf"{_CASED}|\p{{N}}|{_END}", True): "tekken",
    (rf"{_CASED_SHORT}|\p{{N}}{{1,3}}|{_END}", False): "gpt-4o",
}
"""The pattern of a `tokenizer.json`, with whether a word that is a token needs no merges; and its name in llama.cpp."""
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's words.

    Attributes:
        model: `gpt2` for bytes and merges, `llama` for pieces and scores.
        pattern: how text is split before, of the first; None for the other.
        space_prefix: whether a space is put before a text.
    """

    model: str
    pattern: str | None = None
    space_prefix: bool = False


def vocabulary(tokenizer: Any) -> Vocabulary:
    """A tokenizer of transformers as llama.cpp has it; raises `ModelError`, with the reason, for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} is no tokenizer of the library tokenizers")
    written = json.loads(backend.to_str())
    model = written["model"]
    if (kind := model.get("type")) != "BPE":
        raise ModelError(f"a tokenizer of kind {kind} is not written, BPE and SentencePiece's BPE are")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ModelError(f"llama.cpp's BPE has no {key}")
    steps = list(_steps(written.get("pre_tokenizer")))
    if steps and steps[-1]["type"] == "ByteLevel":
        return Vocabulary("gpt2", _pattern(written, steps, bool(model.get("ignore_merges"))))
    found = Vocabulary("llama", space_prefix=_space_prefix(written, steps))
    _check_pieces(model)
    return found


def _steps(section: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one or a sequence."""
    if section is None:
        return
    for name in ("normalizers", "pretokenizers"):
        if name in section:
            for step in section[name]:
                yield from _steps(step)
            return
    yield section


def _pattern(written: Mapping[str, Any], steps: list[dict[str, Any]], whole_words: bool) -> str:
    """What llama.cpp calls the way in which a byte-level tokenizer splits text."""
    for step in _steps(written.get("normalizer")):
        if step["type"] != "NFC":
            raise ModelError(f"llama.cpp changes no text before it splits it, and the tokenizer has {step['type']}")
    *before, last = steps
    if last.get("add_prefix_space"):
        raise ModelError("llama.cpp's BPE puts no space before a text")
    kinds = [step["type"] for step in before]
    if last.get("use_regex", True) and not whole_words:
        if not kinds:
            return "gpt-2"
        if kinds == ["Digits"] and before[0].get("individual_digits"):
            return "smollm"
    if kinds == ["Split"] and not last.get("use_regex", True) and before[0].get("behavior") == "Isolated":
        pattern = before[0]["pattern"].get("Regex")
        if (known := _PATTERNS.get((pattern, whole_words))) is not None:
            return known
        raise ModelError(f"llama.cpp is not known to have the pattern by which the tokenizer splits text: {pattern}")
    raise ModelError(
        f"llama.cpp is not known to split text as the tokenizer does, by {', '.join([*kinds, 'ByteLevel'])}"
    )


def _space_prefix(written: Mapping[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether a tokenizer of pieces puts a space before a text."""
    if not written["model"].get("byte_fallback"):
        raise ModelError("a BPE that is neither byte-level nor falls back to bytes is none of llama.cpp's")
    prefix = False
    for step in _steps(written.get("normalizer")):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != _SPACE:
            raise ModelError(f"llama.cpp only writes {_SPACE} for spaces, and the tokenizer has {step['type']}")
    for step in steps:
        if step["type"] == "Metaspace" and not step.get("split", True):
            prefix = step.get("prepend_scheme", "always") != "never"
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # of which none is left
            raise ModelError(f"llama.cpp's SentencePiece takes a text whole, and the tokenizer has {step['type']}")
    return prefix


def _check_pieces(model: Mapping[str, Any]) -> None:
    """llama.cpp joins the neighbours that make the piece of the highest score, any two of them: raise `ModelError`
    unless merges come by their pieces, and are all that make these."""
    merges, vocab = _merges(model), model["vocab"]
    made = [left + right for left, right in merges]
    if sum(1 for _ in groupby(made)) != len(set(made)):
        raise ModelError("the merges of the tokenizer are not in the order of the pieces that they make")
    known = set(merges)
    for piece in dict.fromkeys(made):
        for i in range(1, len(piece)):
            if piece[:i] in vocab and piece[i:] in vocab and (piece[:i], piece[i:]) not in known:
                what = f"{piece[:i]!r} and {piece[i:]!r}, which make {piece!r}, are not merged"
                raise ModelError(f"the merges of the tokenizer are not all that make its pieces: {what}")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files have as one string each."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def write_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Tell a `GGUFWriter` the first `size` tokens of a tokenizer that `vocabulary` takes, those that the model has."""
    found, model = vocabulary(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens, types = _tokens(tokenizer, model, size, pieces=found.model == "llama")
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pattern or "default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = _merges(model)
    if found.model == "llama":
        rank: dict[str, int] = {}
        for left, right in merges:
            rank.setdefault(left + right, len(rank))
        writer.add_token_scores([-float(rank.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(found.space_prefix)
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None and token < size:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, model: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """The texts of the tokens 0 to `size` - 1 and their types; ids without a token get a text that is no other's."""
    from gguf import TokenType

    texts = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, i in model["vocab"].items():
        if i < size:
            byte = pieces and len(text) == 6 and text.startswith("<0x")
            texts[i], types[i] = text, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < size:
            kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
            text = added.content if added.special else added.content.replace(_SPACE, " ")  # as it stands in a text
            texts[i], types[i] = text, int(kind)
    if (unknown := model.get("unk_token")) is not None and pieces and model["vocab"].get(unknown, size) < size:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    return texts, types
