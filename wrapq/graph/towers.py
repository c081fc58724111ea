"""The parts of a model that tokens do not go through, such as what encodes images or sound for its language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def find_towers(model: Any) -> tuple[str, ...]:
    """The names of the outermost modules with parameters beside the language model in a transformers `model` for text
    and more, such as a vision tower and what projects its output; none in other models."""
    config = getattr(model, "config", None)
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    if not any(part is not None and not hasattr(part, "vocab_size") for part in parts):
        return ()
    language = model.get_decoder()
    if language is model or not isinstance(language, nn.Module):
        return ()
    inner = {id(module) for module in (language, model.get_input_embeddings(), model.get_output_embeddings())}
    return tuple(_beside(model, "", inner))


def _beside(module: nn.Module, name: str, inner: set[int]) -> Iterator[str]:
    for key, child in module.named_children():
        path = f"{name}.{key}".removeprefix(".")
        if id(child) in inner:
            continue
        if any(id(each) in inner for each in child.modules()):
            yield from _beside(child, path, inner)
        elif next(child.parameters(), None) is not None:
            yield path
