"""Writing a converted model as a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.export.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    extra_tensors,
    file_rows,
    float_matrix,
    write_facts,
)
from wrapq.export.gguf.ggml_types import blocks, float_tensor, type_of
from wrapq.export.gguf.vocabulary import write_vocabulary
from wrapq.runtime.module import QuantizedWeight
from wrapq.runtime.stand_in import original_class

_IN_FLOAT32 = ("_norm.weight", "position_embd.weight")


def write_gguf(model: nn.Module, tokenizer: Any, path: Path, name: str, dtype: torch.dtype) -> None:
    """Write the converted `model` to `path`.

    Args:
        model: the converted one, of a class of `ARCHITECTURES`; its points are weights alone.
        tokenizer: the model's, of transformers.
        path: the file.
        name: what the file calls the model.
        dtype: of the matrices that are not quantized: float32, float16 or bfloat16. Vectors are in float32.

    Raises:
        ModelError: something in the model has no place in the file.
    """
    import gguf

    architecture, embedding = ARCHITECTURES[original_class(model).__name__], cast(Any, model).get_input_embeddings()
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(name)
    write_facts(writer, model.config, architecture)
    sizes: Counter[Any] = Counter()
    for key, array, kind in _tensors(model, architecture, dtype):
        writer.add_tensor(key, array, raw_dtype=kind)
        sizes[kind.name] += array.nbytes
    ((most, _),) = sizes.most_common(1)
    types = gguf.LlamaFileType
    words = {"F32": types.ALL_F32, "MXFP4": types.MOSTLY_MXFP4_MOE}
    words |= {"Q4_K": types.MOSTLY_Q4_K_S, "Q5_K": types.MOSTLY_Q5_K_S}
    writer.add_file_type(words[most] if most in words else types[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(embedding.num_embeddings)
    write_vocabulary(writer, tokenizer, embedding.num_embeddings)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: nn.Module, architecture: Architecture, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray, Any]]:
    """llama.cpp's name of each tensor, its bytes and ggml's type of it; one that is tied to another is left out."""
    import gguf

    config: Any = model.config
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)
    embedding: Any = cast(Any, model).get_input_embeddings()
    for name, module in model.named_modules():
        if module is not embedding and _same_weight(module, embedding):
            continue
        quantized = isinstance(module, QuantizedWeight)
        keys = [key for key in module._parameters if not (quantized and key.startswith("weight_"))]
        for key in ["weight"] * quantized + keys:
            where = f"{name}.{key}"
            if (known := names.get_name(where, try_suffixes=(".weight", ".bias"))) is None:
                raise ModelError(f"llama.cpp's {architecture.name} has no {where}")
            rows = file_rows(where, config, architecture)
            if quantized and key == "weight":
                yield known, *_quantized(cast(QuantizedWeight, module), rows, where)
            elif (parameter := module._parameters[key]) is not None:
                matrix = float_matrix(where, module, parameter, architecture)
                matrix = matrix if rows is None else matrix[rows.to(matrix.device)]
                short = matrix.dim() > 1 and not known.endswith(_IN_FLOAT32)
                yield known, *float_tensor(matrix, dtype if short else torch.float32)
    for known, tensor in extra_tensors(config):
        yield known, *float_tensor(tensor, torch.float32)


def _quantized(module: QuantizedWeight, rows: Tensor | None, where: str) -> tuple[np.ndarray, Any]:
    from gguf import GGMLQuantizationType

    codes, qparams = module.codes(), module.qparams("weight")
    if rows is not None:
        rows = rows.to(codes.device)
        codes, qparams = codes[rows], qparams.of_rows(rows)
    return blocks(codes, qparams, where), GGMLQuantizationType[cast(str, type_of(qparams.spec)).upper()]


def _same_weight(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the very same weight, or the very scales of one."""
    mine, theirs = ({**m._parameters, **m._buffers} for m in (module, other))
    return any(mine.get(key) is not None and mine[key] is theirs.get(key) for key in ("weight", "weight_scale"))
