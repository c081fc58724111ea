"""Opening a model: on the meta device for the plan, with its weights for the run."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError, PlanError, Problem, and_more, reading, reason_of
from wrapq.graph.blocks import find_blocks, without_cache
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.paths import expand
from wrapq.recipe.schema import ModelConfig
from wrapq.resolve.model_class import auto_model, why_no_language_model
from wrapq.resolve.model_path import ANY_MODULE, locate
from wrapq.resolve.shards import Shards
from wrapq.resolve.stored import FLOATS, GGUF, MANIFEST, MARKS, TORCHAO, StoredWeights, find_stored, while_loading
from wrapq.wrappers.experts import forget_fused, take_apart

GENERATION = "generation_config.json"
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "audio_tokenizer_config.json"),
)
"""What transformers' processors are made of, beside the tokenizer."""
_MOST = 1024
_TRIED = 8  # tokens


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
        self.path = locate(config.path)
        self.options = {"trust_remote_code": trust_remote_code, "revision": config.revision}
        self._gguf = {"gguf_file": Path(self.path).name} if self.path.endswith(GGUF) else {}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype to compute with: the recipe's, else the one that the checkpoint's configuration says, else the one
        of most of its weights; float32 where that is another than a recipe may say."""
        config = self.hf_config
        found = self.config.dtype or config.dtype or config.get_text_config().dtype or self._stored_dtype()
        dtype = getattr(torch, str(found).removeprefix("torch."), None)
        return dtype if dtype in _COMPUTED else torch.float32

    def _stored_dtype(self) -> str | None:
        sizes: Counter[str] = Counter()
        shards = Shards(sorted(Path(self.path).glob("*.safetensors")))
        for shape, kind in map(shards.layout, shards):
            sizes[kind] += math.prod(shape)
        return FLOATS.get(sizes.most_common(1)[0][0]) if sizes else None

    @cached_property
    def hf_config(self) -> Any:
        """The model's transformers configuration; raises `PlanError` where it is of no causal language model."""
        from transformers import AutoConfig

        with self._reading("configuration"):
            config = AutoConfig.from_pretrained(self._folder, **self._gguf, **self.options)
        if (kind := why_no_language_model(config)) is not None:
            what = f"{self.config.path} holds {kind}, and wrapq run measures causal language models alone"
            raise PlanError([Problem("", "model.path", what, (), ANY_MODULE)])
        return config

    @property
    def _folder(self) -> str:
        return str(Path(self.path).parent) if self._gguf else self.path

    @cached_property
    def stored(self) -> StoredWeights | None:
        """What the checkpoint holds in place of float weights; None where it holds these."""
        return find_stored(self.path, None if self._gguf else self.hf_config)

    def check_stored(self) -> None:
        """Raise `PlanError` unless the weights are floats, or are to be taken apart and can be."""
        stored, asked = self.stored, self.config.dequantize
        if stored is None and asked:
            what = f"nothing to take apart: the weights of {self.config.path} are floats"
            raise PlanError([Problem("", "model.dequantize", what, (), "leave it out")])
        if stored is None:
            return
        what = f"{self.config.path} is quantized already: {stored.what}"
        float_one = "give the float model that it was made from"
        if (reason := stored.why_not()) is not None:
            raise PlanError([Problem("", "model.path", f"{what}; {reason}", (), float_one)])
        if not asked:
            remedy = f"{float_one}, or start from what it is when taken apart: model.dequantize=true"
            raise PlanError([Problem("", "model.path", what, (), remedy)])

    def meta_model(self) -> nn.Module:
        """The model without weights: every parameter has a shape and no storage."""
        self.check_stored()
        trust = self.options["trust_remote_code"]
        config = copy.deepcopy(self.hf_config)  # which the model changes, and of which the digest is taken
        forget_quantization(config)
        for key, count in _counts(config.to_dict()):
            if count > _MOST:  # each of them costs time here, as a mistyped number would for hours
                what = f"the config.json of {self.config.path} asks for {key} {count}; wrapq takes {_MOST}"
                raise PlanError([Problem("", "model.path", what)])
        with self._reading("configuration"), torch.device("meta"), _quiet():
            model = auto_model(config).from_config(config, dtype=self.dtype, trust_remote_code=trust)
            model.tie_weights()
        return model.eval()

    def load(self, device: torch.device) -> nn.Module:
        """The model with its weights, in evaluation mode on `device`, taken apart where the recipe says so; raises
        `ModelError` unless all are there."""
        self.check_stored()
        options = {"dtype": self.dtype, "output_loading_info": True, "weights_only": True, **self.options, **self._gguf}
        section = self.stored.config if self.stored else {}
        if section and (config := while_loading(section)) is not None:
            options["quantization_config"] = config
        options["ignore_mismatched_sizes"] = True  # else they are told in a log, and here only that there are some
        with self._reading("weights"), _quiet():
            model, info = auto_model(self.hf_config).from_pretrained(self._folder, **options)
        if lacking := sorted(info["missing_keys"]):  # transformers fills them with random numbers
            raise self._lacks(lacking)
        if wrong := [_unlike(name, found, wanted) for name, found, wanted in sorted(info["mismatched_keys"])]:
            raise self._others(wrong)
        if self.stored is not None:
            with self._reading("weights"), _quiet():
                own = section.get("quant_method") == TORCHAO
                later = section and not own and "quantization_config" not in options
                tensors = (model.dequantize() if later else model).state_dict()
                tensors = {name: t.dequantize() if own else t for name, t in tensors.items()}
            model = self.filled(tensors, device)
        self._try(model.eval().requires_grad_(False).to(device))
        return model

    def _try(self, model: nn.Module) -> None:
        ids = torch.zeros(1, _TRIED, dtype=torch.int64, device=next(model.parameters()).device)
        # what no configuration is refused for, such as a probability beyond 1, shows here and not in the middle
        with reading(f"model.path {self.config.path}: the model does not compute", ModelError), torch.no_grad():
            model(**without_cache(model, {"input_ids": ids}))

    def filled(self, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
        """The plain model with the weights `tensors` on `device`, of a checkpoint that was taken apart; raises
        `ModelError` unless they are floats, all that it takes, and no more."""
        model = take_apart(self.meta_model(), filter(EXPERT_NAME.fullmatch, tensors)).requires_grad_(False)
        forget_fused(model)
        every = dict(model.named_parameters(remove_duplicate=False))
        named = {name: parameter for name, parameter in every.items() if name in tensors}
        if lacking := sorted(name for name, _ in model.named_parameters() if name not in tensors):
            raise self._lacks(lacking, " when they are taken apart")
        shapes = [_unlike(n, tensors[n].shape, p.shape) for n, p in named.items() if tensors[n].shape != p.shape]
        wrong = [f"{n} is {tensors[n].dtype}" for n in named if tensors[n].dtype not in (torch.float64, *_COMPUTED)]
        more = [n for n in tensors if n.endswith((".weight", ".bias")) and n not in every]
        if wrong := [*shapes, *wrong, *(f"the model has no {name}" for name in more)]:
            raise self._others(wrong)
        self._fill(model, tensors, device)
        read_generation(model, Path(self._folder))
        return model.eval()

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
        self._fill(model, weights, device, lambda name: blocks.index(name) is None)
        read_generation(model, Path(self.path))
        return model.eval(), weights

    def _named_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The tensors of the checkpoint under the model's names, which may differ by the base model's prefix."""
        files = sorted(Path(self.path).glob("*.safetensors"))
        if not files:
            what = f"model.path {self.config.path}: no safetensors files in it"
            raise ModelError(f"{what}, which runtime.load=streaming reads from: give a folder that has them")
        shards = Shards(files)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        own = {name: name for name in shards}
        names = own | {prefix + name: name for name in own} | {name.removeprefix(prefix): name for name in own} | own
        if lacking := [name for name, _ in model.named_parameters() if name not in names]:
            remedy = "; transformers may convert them when it loads the model whole: runtime.load=whole"
            raise self._lacks(lacking, " under the names that the model has for them", remedy)
        shards = shards.renamed(names)
        wrong = []
        for name, parameter in model.named_parameters():
            shape, kind = shards.layout(name)
            if shape != tuple(parameter.shape):
                wrong.append(_unlike(name, shape, parameter.shape))
            elif parameter.is_floating_point() and kind not in FLOATS:
                wrong.append(f"{name} is {kind}, as of a model that is quantized already")
        if wrong:
            raise self._others(wrong)
        return shards

    def _others(self, wrong: Sequence[str]) -> ModelError:
        return ModelError(f"model.path {self.config.path}: weights that are not the model's: {and_more(wrong)}")

    def _lacks(self, names: Sequence[str], where: str = "", remedy: str = "") -> ModelError:
        shown = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        what = f"{len(names)} tensors are not in the weights{where}: {shown}{remedy}"
        return ModelError(f"model.path {self.config.path}: {what}")

    def _fill(
        self,
        model: Any,
        weights: Mapping[str, Tensor],
        device: torch.device,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """The parameters of the modules that are `wanted`, and all buffers as in a model that was loaded whole: read,
        or computed by the model where no file has them."""
        read: dict[int, nn.Parameter] = {}
        for name, table in [(name, m._parameters) for name, m in model.named_modules() if wanted(name)]:
            for key, meta in [(key, p) for key, p in table.items() if p is not None]:
                if id(meta) not in read:
                    tensor = weights[f"{name}.{key}".removeprefix(".")].to(device, meta.dtype)
                    read[id(meta)] = nn.Parameter(tensor, requires_grad=False)
                table[key] = read[id(meta)]
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

        named = str(expand(self.config.tokenizer)) if self.config.tokenizer else None
        with self._reading("tokenizer"):
            return AutoTokenizer.from_pretrained(named or self._folder, **({} if named else self._gguf), **self.options)

    def processor_files(self) -> dict[str, str]:
        """The files beside the model that say how to make images, sound and conversations its input, by their names."""
        from transformers.utils import cached_file

        here = Path(self._folder).is_dir()
        if not here and not getattr(self.hf_config, "sub_configs", None):
            return {}  # a model on the hub that takes text alone need not be asked for them
        kinds = ("missing_entries", "connection_errors", "gated_repo")
        tried: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
        found = {n: cached_file(self._folder, n, revision=self.config.revision, **tried) for n in PROCESSOR_FILES}
        with self._reading("processor"):
            return {name: Path(path).read_text(encoding="utf-8") for name, path in found.items() if path is not None}

    def digest(self) -> str:
        """SHA-256 over the configuration and the weight files' bytes; for a hub name, over name and revision."""
        config = self.hf_config.to_dict()
        config.pop("_name_or_path", None)  # where it lies; the same model may lie elsewhere
        sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        own = [Path(self.path, MANIFEST)] if self.stored is not None and self.stored.kind == "wrapq" else []
        files = [Path(self.path)] if self._gguf else [*sorted(Path(self.path).glob("*.safetensors")), *own]
        for file in files:
            with file.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
        if not files:
            sha.update(f"{self.path}@{getattr(self.hf_config, '_commit_hash', None)}".encode())
        return sha.hexdigest()

    def _reading(self, what: str) -> AbstractContextManager[None]:
        return reading_model(f"model.path {self.config.path}: cannot read the {what}")


def _unlike(name: str, shape: Sequence[int], wanted: Sequence[int]) -> str:
    return f"{name} is {list(shape)}, and the model's {list(wanted)}"


def reading_model(failure: str) -> AbstractContextManager[None]:
    """As `reading`, while transformers opens a part of a model; raises `ModelError`."""
    return reading(failure, ModelError, _why_unread)


def read_generation(model: Any, folder: Path) -> None:
    """Give `model` how it generates, where `folder` has a file that says so; raises `ModelError` for a damaged one."""
    from transformers import GenerationConfig

    if (folder / GENERATION).is_file():
        with reading_model(f"{folder / GENERATION} cannot be read"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _why_unread(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it needs code that comes with it, which is never run unasked: runtime.trust_remote_code=true on the "
            "command line, or trust_remote_code=True of wrapq.load, allows it"
        )
    if isinstance(error, UnpicklingError):
        return "it is a pickle of more than tensors, which is never loaded: give safetensors files"
    return reason_of(error)


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of layers and experts in a configuration and those inside it, by their keys."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", count) for name, count in _counts(value))
        elif isinstance(value, int) and key.endswith(("layer", "layers", "experts")) and "size" not in key:
            yield key, value


def forget_quantization(config: Any) -> None:
    """Take out of a configuration, and of those inside it, what it says of quantization."""
    for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))):
        for mark in MARKS:
            if hasattr(part, mark):
                delattr(part, mark)


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers' own bars and notes would cut through ours
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # as is meant
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
