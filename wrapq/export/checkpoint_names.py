"""The names that checkpoints of a family have for its layers, where those of its modules are others.

transformers keeps all experts of a layer in one tensor, which it makes from a tensor for each expert; `transformers/
conversion_mapping.py` has their names. Readers that came before it, as vLLM, know those names alone. Of some families
it knows but one tensor for all experts, in which nothing is quantized; vLLM reads a tensor for each of these, too.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), "up_proj": ("up_proj",)}
"""What an expert that is a module has for a tensor of all experts."""

GPT_OSS = "gpt_oss"
_ONE_BY_ONE = {
    **dict.fromkeys(("granitemoe", "granitemoeshared"), ("gate_proj", "up_proj", "down_proj")),
    GPT_OSS: ("gate_up_proj", "down_proj"),
}
"""The parts of experts that vLLM 0.32 and 0.33 read one by one of families for which transformers has no such names: as
`RoutedExperts.load_weights` of vLLM has them, and `_get_streamed_expert_info` in its `gpt_oss.py`."""
_PACKED = ((".gate_up_proj.weight_packed", ".w13_weight_packed"), (".down_proj.weight_packed", ".w2_weight_packed"))
"""What vLLM calls packed experts of GPT-OSS; it knows their scales and biases by both names."""


class CheckpointNames(NamedTuple):
    """How a family's checkpoints call things.

    Attributes:
        parts: for each part of an expert that readers put together its name there, such as `w1` for `gate_proj`;
            empty where they put none together.
        renamed: pairs of what a name holds and what stands there instead, in this order.
        whole: whether a configuration names the experts of a layer by one pattern, not by the names of their parts.
    """

    parts: dict[str, str]
    renamed: tuple[tuple[str, str], ...] = ()
    whole: bool = False

    def of(self, name: str) -> str:
        """The checkpoint's name of a tensor called `name`."""
        experts, found, rest = name.partition(".experts.")
        index, *inner = rest.split(".")
        if found and len(inner) > 1 and inner[0] in self.parts:
            name = f"{experts}.experts.{index}.{self.parts[inner[0]]}.{'.'.join(inner[1:])}"
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def of_module(self, name: str) -> str:
        """What a configuration calls a module called `name`: its name in the checkpoint, or `re:` and a pattern."""
        if self.whole and ".experts." in name:
            return f"re:{re.escape(name.partition('.experts.')[0])}[.]experts[.]"
        return self.of(f"{name}.weight").removesuffix(".weight")


@cache
def checkpoint_names(model: str) -> CheckpointNames | None:
    """Those of the class `model` of transformers; None for a model with code of its own."""
    import transformers
    from transformers import conversion_mapping

    if (kind := getattr(transformers, model, None)) is None:
        return None
    model_type = kind.config_class.model_type
    if one_by_one := _ONE_BY_ONE.get(model_type):
        parts = {part: part for part in one_by_one}
        return CheckpointNames(parts, _PACKED, True) if model_type == GPT_OSS else CheckpointNames(parts)
    parts = {}
    renamed: list[tuple[str, str]] = []
    for step in conversion_mapping.get_checkpoint_conversion_mapping(model_type) or ():
        sources, targets = _listed(getattr(step, "source_patterns", ())), _listed(getattr(step, "target_patterns", ()))
        if not hasattr(step, "operations") and len(sources) == len(targets) == 1:
            renamed.append((targets[0], sources[0]))
        merged = [source.split(".")[-2] for source in sources if ".experts.*." in source]
        ours = _PARTS.get(targets[0].rpartition(".")[2], ()) if targets else ()
        if len(merged) == len(ours):
            parts |= dict(zip(ours, merged, strict=True))
    known = all(part == other for part, other in parts.items())  # readers know the modules' names, too
    return CheckpointNames(parts, () if known else tuple(reversed(renamed)))


def _listed(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
