"""A folder that `from_pretrained` of transformers loads: `config.json`, and all tensors in one `model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.export.base import Folder, Refusals
from wrapq.export.reload import Answer, read
from wrapq.graph.usage import find_initialized
from wrapq.resolve.model_source import ModelSource
from wrapq.resolve.plan import Plan
from wrapq.runtime.module import QuantizedModule

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def all_tensors(model: nn.Module, packed: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Everything that the checkpoint of a converted `model` holds: tied tensors once, and in the place of what its
    quantized modules hold for their points what is in `packed` by their names."""
    own = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key in (*module._parameters, *module._buffers)
        if any(key.startswith(f"{point}_") for point in module.specs)
    }
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape)
        if name not in own and not (tensor.numel() and place in seen):
            seen.add(place)
            tensors[name] = tensor
    tensors |= {f"{name}.{key}": tensor for name, part in packed.items() for key, tensor in part.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_checkpoint(
    folder: Folder,
    model: nn.Module,
    dtype: str,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, str],
    quantization: Mapping[str, Any],
) -> None:
    """Write `tensors`, and the configuration of `model`, which computes in `dtype`; `facts` are what
    the file says of the tensors, and `quantization` is the section on how it is quantized, empty for a float model."""
    from safetensors.torch import save_file

    folder.write(WEIGHTS, lambda path: save_file(dict(tensors), path, metadata={"format": "pt", **facts}))
    config = json.loads(cast(Any, model).config.to_json_string())
    config.pop("_name_or_path", None)  # where the float model lay on this machine
    config |= {"dtype": dtype, **({"quantization_config": dict(quantization)} if quantization else {})}
    folder.write_text(CONFIG, json.dumps(config, indent=2) + "\n")


def read_checkpoint(folder: Path, ids: Tensor, device: str) -> Answer:
    """What transformers computes from the checkpoint in `folder` for token ids [B, T]; see `wrapq.export.reload`.

    Raises:
        ModelError: it does not load the checkpoint.
    """
    answer = read(folder, ids, device)
    if not answer.logits:
        raise ModelError(f"transformers does not load the export: {answer.reason}")
    return answer


def refuse_initialized(plan: Plan, refusals: Refusals, stored: Mapping[str, torch.dtype | None]) -> None:
    """Refuse layers whose weights transformers does not find where it initializes the modules around them, before it
    unpacks any; `stored` has the quantized ones, with the dtype of their `weight`, None where there is none."""
    import transformers

    if not hasattr(transformers, plan.model.type):  # code of the model's own, which no export takes along
        return
    model = ModelSource(plan.recipe.model).meta_model()
    there = {name for name, module in model.named_modules() if module._parameters.get("weight") is not None}
    found = {name: dtype for name, dtype in stored.items() if name in there}
    failing = find_initialized(model, found) if found else ()
    for module in (module for module in plan.modules if module.name in failing):
        what = f"transformers does not load a {plan.model.type} whose {module.type} there is not a float"
        remedy = "quantize it otherwise, leave it float, or run with export=none"
        refusals.refuse(module, f"{what}: it initializes the weight", remedy)
