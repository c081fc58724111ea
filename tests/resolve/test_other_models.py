"""Checkpoints that hold no causal language model are refused with what they are and what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models import without_weights
from wrapq.errors import PlanError
from wrapq.recipe.compose import compose
from wrapq.resolve.model_class import why_no_language_model
from wrapq.resolve.resolve import resolve

REFUSED = [
    ("Bert", ["BertModel"], {}, "BertModel, an encoder"),
    ("Bert", ["BertForMaskedLM"], {}, "BertForMaskedLM, an encoder"),
    ("Roberta", None, {}, "of the type roberta, an encoder"),
    (
        "ModernBert",
        ["ModernBertModel"],
        {},
        "ModernBertModel, and transformers makes no",
    ),
    ("T5", ["T5ForConditionalGeneration"], {}, "T5ForConditionalGeneration, and transformers makes no"),
    ("Bart", ["BartForConditionalGeneration"], {}, "BartForConditionalGeneration, an encoder with a decoder"),
    ("Whisper", None, {}, "of the type whisper, an encoder with a decoder"),
    ("ViT", ["ViTForImageClassification"], {}, "ViTForImageClassification, and transformers makes no"),
    ("Llama", ["LlamaForSequenceClassification"], {}, "LlamaForSequenceClassification, a language model with another"),
]
TAKEN = [
    ("Llama", None, {}),
    ("Llama", ["LlamaModel"], {}),
    ("Gemma2", ["Gemma2Model"], {}),
    ("GPT2", ["GPT2LMHeadModel"], {}),
    ("GPTNeoX", ["GPTNeoXForCausalLM"], {}),  # whose is_decoder is false
    ("GPTNeoX", ["GPTNeoXModel"], {}),
    ("Bert", ["BertLMHeadModel"], {"is_decoder": True}),
    ("Bart", ["BartForCausalLM"], {"is_decoder": True, "is_encoder_decoder": False}),
    ("Llava", ["LlavaForConditionalGeneration"], {}),
    ("Gemma3", ["Gemma3ForConditionalGeneration"], {}),
    ("Qwen2VL", ["Qwen2VLModel"], {}),
]


def config(family: str, names: list[str] | None, more: dict[str, Any]) -> Any:
    return getattr(transformers, f"{family}Config")(architectures=names, **more)


@pytest.mark.parametrize(("family", "names", "more", "said"), REFUSED)
def test_what_is_no_language_model(family: str, names: list[str] | None, more: dict[str, Any], said: str) -> None:
    assert (why_no_language_model(config(family, names, more)) or "").startswith(said)


@pytest.mark.parametrize(("family", "names", "more"), TAKEN)
def test_language_models_and_their_headless_bodies(family: str, names: list[str] | None, more: dict[str, Any]) -> None:
    assert why_no_language_model(config(family, names, more)) is None


def test_code_that_comes_with_a_model_says_so_itself() -> None:
    own = transformers.ViTConfig(architectures=["TheirsForCausalLM"])
    assert why_no_language_model(own) is not None
    own.auto_map = {"AutoModelForCausalLM": "theirs.TheirsForCausalLM"}
    assert why_no_language_model(own) is None


def test_the_plan_says_what_the_checkpoint_is_and_what_to_do(tmp_path: Path) -> None:
    encoder = without_weights(tmp_path / "encoder", model_type="bert", architectures=["BertModel"])
    composed = compose(["recipe=w8a16", "model=hf", f"model.path={encoder}"])
    with pytest.raises(PlanError) as error:
        resolve(composed.recipe, composed.sources)
    assert str(error.value) == (
        "1 problem in the plan:\n"
        f"  - override model.path={encoder}: model.path: {encoder} holds BertModel, an encoder, and wrapq run measures "
        "causal language models alone\n"
        "    from Python wrapq.quantize(module, recipe, batches) takes any module"
    )
