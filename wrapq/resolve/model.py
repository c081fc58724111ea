"""Opening a model: on the meta device for the plan, with its weights for the run."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from wrapq.calibration.blocks import find_blocks
from wrapq.errors import ModelError, PlanError, Problem
from wrapq.recipe.schema import ModelConfig
from wrapq.recipe.suggest import alike
from wrapq.resolve.shards import Renamed, Shards
from wrapq.wrappers.experts import forget_fused, take_apart

PACKAGED = "wrapq://"
_GENERATION = "generation_config.json"
_SHOWN = 80
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class ModelSource:
    """Where a model's configuration, weights and tokenizer come from.

    Args:
        config: the recipe's model section. `path` is a folder, `wrapq://demo` for the model that ships with wrapq, or
            the name of a repository on the Hugging Face hub.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        PlanError: the path does not exist, or does not hold a model.
    """

    def __init__(self, config: ModelConfig, trust_remote_code: bool = False) -> None:
        self.config = config
        self.path = _locate(config.path)
        self.options = {"trust_remote_code": trust_remote_code, "revision": config.revision}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute with."""
        return getattr(torch, self.config.dtype)

    @cached_property
    def hf_config(self) -> Any:
        """The model's transformers configuration."""
        from transformers import AutoConfig

        return self._open("configuration", lambda: AutoConfig.from_pretrained(self.path, **self.options))

    def meta_model(self) -> nn.Module:
        """The model without weights: every parameter has a shape and no storage."""
        from transformers import AutoModelForCausalLM

        trust = self.options["trust_remote_code"]
        config = copy.deepcopy(self.hf_config)  # which the model changes, and of which the digest is taken
        with torch.device("meta"), _quiet():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=trust)
        model.tie_weights()
        return model.eval()

    def load(self, device: torch.device) -> nn.Module:
        """The model with its weights, in evaluation mode on `device`; raises `ModelError` unless all are there."""
        from transformers import AutoModelForCausalLM

        options = {"dtype": self.dtype, "output_loading_info": True, **self.options}
        with _quiet():
            model, info = self._open("weights", lambda: AutoModelForCausalLM.from_pretrained(self.path, **options))
        if lacking := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            shown = f"{', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}"
            raise ModelError(f"model.path {self.config.path}: {len(lacking)} tensors are not in the weights: {shown}")
        return model.eval().requires_grad_(False).to(device)

    def open_blocks(self, device: torch.device, names: Iterable[str] = ()) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """The model with all weights but those of its repeated blocks, and all weights by the model's names.

        The parameters of the blocks are on the meta device, and no weight is read before it is asked for. Experts among
        `names` are modules: see `wrapq.wrappers.experts`.

        Raises:
            ModelError: the weights are not in safetensors files, or not under the names that the model has for them.
        """
        model = take_apart(self.meta_model(), names).requires_grad_(False)
        forget_fused(model)
        weights = self._named_weights(model)
        blocks = find_blocks(model)
        tables = [(name, m._parameters) for name, m in model.named_modules() if blocks.index(name) is None]
        read: dict[int, nn.Parameter] = {}
        for name, table in tables:
            for key, meta in [(key, p) for key, p in table.items() if p is not None]:
                if id(meta) not in read:
                    tensor = weights[f"{name}.{key}".removeprefix(".")].to(device, meta.dtype)
                    read[id(meta)] = nn.Parameter(tensor, requires_grad=False)
                table[key] = read[id(meta)]
        self._fill_buffers(model, weights, device)
        if (Path(self.path) / _GENERATION).is_file():
            from transformers import GenerationConfig

            cast(Any, model).generation_config = GenerationConfig.from_pretrained(self.path)
        return model.eval(), weights

    def _named_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of the checkpoint under the model's names, which may differ by the base model's prefix."""
        files = sorted(Path(self.path).glob("*.safetensors"))
        if not files:
            what = f"model.path {self.config.path}: no safetensors files in it"
            raise ModelError(f"{what}, which runtime.load=streaming reads from: give a folder that has them")
        shards = Shards(files)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names = {name: name for name in shards} | {f"{prefix}{name}": name for name in shards}
        names |= {name.removeprefix(prefix): name for name in shards} | {name: name for name in shards}
        if lacking := [name for name, _ in model.named_parameters() if name not in names]:
            shown = f"{', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''}"
            raise ModelError(
                f"model.path {self.config.path}: {len(lacking)} tensors are not in the weights under the names that "
                f"the model has for them: {shown}; transformers may convert them when it loads the model whole: "
                f"runtime.load=whole"
            )
        return Renamed(shards, names)

    def _fill_buffers(self, model: Any, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Buffers as in a model that was loaded whole: read, or computed by the model where no file has them."""
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # what transformers marks those with that it must not initialize
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else torch.empty_like(buffer, device=device)
        model.initialize_weights()
        for name, buffer in model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    @property
    def vocab_size(self) -> int | None:
        """How many token ids the model has, where its configuration says so."""
        return getattr(self.hf_config.get_text_config(), "vocab_size", None)

    def tokenizer(self) -> Any:
        """The model's tokenizer, or the one the recipe names."""
        from transformers import AutoTokenizer

        path = self.config.tokenizer or self.path
        return self._open("tokenizer", lambda: AutoTokenizer.from_pretrained(path, **self.options))

    def digest(self) -> str:
        """SHA-256 over the configuration and the weight files' bytes; for a hub name, over name and revision."""
        config = self.hf_config.to_dict()
        config.pop("_name_or_path", None)  # where it lies; the same model may lie elsewhere
        sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        files = sorted(Path(self.path).glob("*.safetensors")) if Path(self.path).is_dir() else []
        for file in files:
            with file.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
        if not files:
            sha.update(f"{self.path}@{getattr(self.hf_config, '_commit_hash', None)}".encode())
        return sha.hexdigest()

    def _open(self, what: str, load: Any) -> Any:
        try:
            return load()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"model.path {self.config.path}: cannot read the {what}: {reason}") from error


def _locate(path: str) -> str:
    """The folder or hub name that `path` means."""
    if path.startswith(PACKAGED):
        assets, name = resources.files("wrapq") / "assets", path.removeprefix(PACKAGED)
        if not (assets / name).is_dir():
            raise _no_model(path, [f"{PACKAGED}{close}" for close in alike(name, [f.name for f in assets.iterdir()])])
        return str(assets / name)
    try:
        folder = Path(path).expanduser()
        folder.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, a home that is nobody's
        shown = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
        what = f"cannot be a folder: {shown!r} ({getattr(error, 'strerror', None) or error})"
        raise PlanError([Problem("model.path", what)]) from None
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PlanError([Problem("model.path", f"{path} holds no config.json, so it is not a model")])
        return str(folder)
    if _HUB_NAME.fullmatch(path) and not path.startswith((".", "~")) and not folder.parent.is_dir():
        return path
    siblings = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
    raise _no_model(path, [str(folder.parent / close) for close in alike(folder.name, siblings)])


def _no_model(path: str, close: list[str]) -> PlanError:
    remedy = "give a folder with config.json and weights, or a hub name"
    return PlanError([Problem("model.path", f"no such folder: {path}", tuple(close), remedy)])


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers' own bars and notes would cut through ours
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
