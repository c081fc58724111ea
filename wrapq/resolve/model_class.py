"""Which class of transformers makes a model of a configuration."""

from __future__ import annotations

from typing import Any


def auto_model(config: Any) -> Any:
    """The class of transformers that makes a language model of `config`, also where it is a part of one for more."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), AutoModelForCausalLM)
