"""Which class of transformers makes a model of a configuration, and which checkpoints hold no causal language model."""

from __future__ import annotations

from typing import Any

_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""What language models are trained further for, with a head in place of the one that makes logits of tokens."""


def auto_model(config: Any) -> Any:
    """The class of transformers that makes a language model of `config`, also where it is a part of one for more."""
    from transformers import AutoModelForCausalLM

    return next((kind for kind in _kinds() if type(config) in kind._model_mapping), AutoModelForCausalLM)


def why_no_language_model(config: Any) -> str | None:
    """What the checkpoint of `config` is where a causal language model is neither it nor a part of it; None for others,
    among them those whose configuration names no class or one without a head.

    The families of encoders are known by having a class for masked tokens: `is_decoder` is false in some decoders too.
    """
    from transformers import AutoModelForMaskedLM

    given = config.architectures  # whatever the file says
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    shown = ", ".join(names) or f"of the type {config.model_type}"
    known = any(type(config) in kind._model_mapping for kind in _kinds())
    own = getattr(config, "auto_map", None)
    if not known and not (isinstance(own, dict) and "AutoModelForCausalLM" in own):
        return f"{shown}, and transformers makes no language model of the type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{shown}, an encoder with a decoder"
    decodes = getattr(config, "is_decoder", getattr(config, "causal", False))
    if type(config) in AutoModelForMaskedLM._model_mapping and not decodes:
        return f"{shown}, an encoder"
    if names and all(name.endswith(_OTHER_HEADS) for name in names):
        return f"{shown}, a language model with another head"
    return None


def _kinds() -> tuple[Any, ...]:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForCausalLM, AutoModelForMultimodalLM
