"""How the weights of a checkpoint are stored, where they are not floats: in which format, with how many bits, and
whether a library can take them apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from wrapq.errors import ModelError, reason_of
from wrapq.resolve.shards import Shards

GGUF = ".gguf"
TORCHAO = "torchao"
"""The method whose tensors take themselves apart."""
MANIFEST = "manifest.json"
"""What a run of wrapq leaves beside its model."""
MARKS = ("quantization_config", "compression_config")
_ELSEWHERE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
"""Where other tools put what transformers has in `config.json`: ModelOpt, AutoGPTQ, AutoAWQ."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What safetensors calls floats, and what torch does."""
_BITS = ("bits", "num_bits", "w_bit", "nbits", "weight_bits", "quant_algo", "quant_type", "weights", "in_group_size")
_SHOWN = 40


@dataclass(frozen=True)
class StoredWeights:
    """What a checkpoint holds in place of float weights.

    Attributes:
        what: the format and its bits, for messages.
        kind: who knows it: `transformers` by its `quantization_config`, or by its reader of `gguf` files, `wrapq`, or
            nobody here.
        config: the section `quantization_config`.
    """

    what: str
    kind: Literal["transformers", "gguf", "wrapq", "other"]
    config: Mapping[str, Any]

    def why_not(self) -> str | None:
        """Why nobody here can take it apart, such as for want of a package; None where somebody can."""
        if self.kind == "other":
            return "nothing here takes that apart"
        try:
            if self.kind == "gguf":  # packages of transformers' reader
                import_module("gguf"), import_module("accelerate")
            elif self.kind == "transformers":
                return _why_not(self.config)
        except ImportError as error:
            return f"that needs a package: {error}"
        except Exception as error:
            return reason_of(error)
        return None


def find_stored(path: str, config: Any) -> StoredWeights | None:
    """What the checkpoint in the folder `path`, or in the repository on the hub of that name, holds in place of float
    weights, by its configuration, the files beside it, and the headers of its weights; None where it holds floats.

    Args:
        path: the folder, the GGUF file, or the name.
        config: the configuration of transformers; None where there is none.
    """
    folder = Path(path)
    if path.endswith(GGUF):
        return StoredWeights(f"a GGUF file{_file_type(path)}", "gguf", {})
    if (folder / MANIFEST).is_file() and (own := _read(folder / MANIFEST)) and "modules" in own:
        specs = dict.fromkeys(s for points in own["modules"].values() for n, s in points.items() if n == "weight")
        return StoredWeights(f"a run of wrapq ({', '.join(specs) or 'activations only'})", "wrapq", {})
    for section in _sections(config.to_dict()):
        return StoredWeights(describe(section), "transformers", section)
    for name in _ELSEWHERE:
        if (folder / name).is_file():
            found = _read(folder / name)
            return StoredWeights(describe(found.get("quantization", found), f"as {name} says"), "other", {})
    try:
        shards = Shards(sorted(folder.glob("*.safetensors")))
        kinds = {shards.layout(name)[1] for name in shards if name.endswith(".weight")} - FLOATS.keys()
    except ModelError:  # damaged, which is told where they are read
        return None
    return StoredWeights(f"its weights are {', '.join(sorted(kinds))}", "other", {}) if kinds else None


def describe(section: Mapping[str, Any], name: str = "") -> str:
    """A `quantization_config` in a few words: the method, the format, bits and groups."""
    method = str(section.get("quant_method") or name or "quantized")
    facts = [str(section[key]) for key in ("format", "fmt") if isinstance(section.get(key), str)]
    for key in ("load_in_4bit", "load_in_8bit"):
        if section.get(key) or section.get(f"_{key}"):
            facts.append(f"{key[8]} bits")
    facts += dict.fromkeys(_bits(section))
    if isinstance(block := section.get("weight_block_size"), Sequence):
        facts.append(f"blocks of {'x'.join(map(str, block))}")
    if isinstance(size := section.get("group_size", section.get("q_group_size")), int) and size > 0:
        facts.append(f"groups of {size}")
    return method + (f" ({', '.join(facts)})" if facts else "")


def _bits(section: Mapping[str, Any]) -> Iterator[str]:
    for key in _BITS:
        value = section.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            yield f"{value} bits"
        elif isinstance(value, str) and len(value) <= _SHOWN:
            yield value
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        yield from _bits(weights) if isinstance(weights, Mapping) else ()


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a configuration, or those of its parts, says of quantization."""
    for mark in MARKS:
        if config.get(mark):
            yield config[mark]
    for part in config.values():
        if isinstance(part, Mapping) and "model_type" in part:
            yield from _sections(part)


def _why_not(section: Mapping[str, Any]) -> str | None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer
    from transformers.quantizers.base import HfQuantizer

    method = section.get("quant_method")
    if method is not None and not {method, f"{method}_4bit"} & AUTO_QUANTIZATION_CONFIG_MAPPING.keys():
        return f"transformers does not know {method}"
    config = while_loading(section)
    quantizer = AutoHfQuantizer.from_config(config or dict(section), pre_quantized=True)
    if config is None and method != TORCHAO and type(quantizer)._dequantize is HfQuantizer._dequantize:
        return f"transformers does not take {method} apart"
    quantizer.validate_environment(device_map=None)
    return None


def while_loading(section: Mapping[str, Any]) -> Any:
    """What makes transformers take weights with this `quantization_config` apart while it loads them; None for a method
    with which it cannot, but may afterwards."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict(dict(section))
    if not hasattr(config, "dequantize"):
        return None
    config.dequantize = True
    return config


def _file_type(path: str) -> str:
    """What a GGUF file says of itself, such as ` (Q4_K_M)`."""
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata

        kind = import_module("gguf").LlamaFileType(read_gguf_metadata(path)[0]["general.file_type"])
        return f" ({kind.name.removeprefix('MOSTLY_')})"
    except Exception:  # of a file that does not say so, or a version of the library that reads it otherwise
        return ""


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}
