"""Models to test with, made on the spot: the shipped one without weights or damaged, and random ones of each family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import wrapq
from tests.conftest import build_model

DEMO = Path(wrapq.__file__).parent / "assets" / "demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def without_weights(folder: Path, **changes: Any) -> Path:
    """The shipped model's configuration, with `changes`, and its tokenizer; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder / name)
    config = json.loads((DEMO / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def damaged(folder: Path, tensor: str, value: float = float("nan")) -> Path:
    """The shipped model with `value` in row 7 of one of its tensors."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][7, 7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_model(family: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of `family` with two layers of random weights, for the shipped tokenizer."""
    sizes = {"vocab_size": 2048, "max_position_embeddings": 512, "tie_word_embeddings": False}
    return saved(build_model(family, **{**sizes, **changes}), folder)


def model_with_unused_modules(folder: Path) -> Path:
    """A Bart decoder: the projections of its cross attention are never called without an encoder."""
    config = transformers.BartConfig(
        vocab_size=2048,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        max_position_embeddings=512,
        is_decoder=True,
        is_encoder_decoder=False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    )
    torch.manual_seed(0)
    return saved(transformers.BartForCausalLM(config), folder)


def saved(model: Any, folder: Path) -> Path:
    """The checkpoint of `model` in `folder`, for the shipped tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        transformers.utils.logging.enable_progress_bar()
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder / name)
    return folder
