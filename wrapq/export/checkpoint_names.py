"""The names that checkpoints of a family have for its layers, where those of its modules are others.

transformers keeps all experts of a layer in one tensor, which it makes from a tensor for each expert; `transformers/
conversion_mapping.py` has their names. Readers that came before it, as vLLM, know those names alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",), "up_proj": ("up_proj",)}
"""What an expert that is a module has for a tensor of all experts."""


class CheckpointNames(NamedTuple):
    """How a family's checkpoints call things.

    Attributes:
        parts: for each part of an expert that transformers puts together its name there, such as `w1` for `gate_proj`;
            empty where it puts none together.
        renamed: pairs of what a name holds and what stands there instead, in this order.
    """

    parts: dict[str, str]
    renamed: tuple[tuple[str, str], ...] = ()

    def of(self, name: str) -> str:
        """The checkpoint's name of a tensor called `name`."""
        if all(part == other for part, other in self.parts.items()):
            return name  # readers know the modules' names, too
        experts, found, rest = name.partition(".experts.")
        index, *inner = rest.split(".")
        if found and len(inner) > 1 and inner[0] in self.parts:
            name = f"{experts}.experts.{index}.{self.parts[inner[0]]}.{'.'.join(inner[1:])}"
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def of_module(self, name: str) -> str:
        """The checkpoint's name of a module called `name`."""
        return self.of(f"{name}.weight").removesuffix(".weight")


@cache
def checkpoint_names(model: str) -> CheckpointNames | None:
    """Those of the class `model` of transformers; None for a model with code of its own."""
    import transformers
    from transformers import conversion_mapping

    if (kind := getattr(transformers, model, None)) is None:
        return None
    parts: dict[str, str] = {}
    renamed: list[tuple[str, str]] = []
    for step in conversion_mapping.get_checkpoint_conversion_mapping(kind.config_class.model_type) or ():
        sources, targets = _listed(getattr(step, "source_patterns", ())), _listed(getattr(step, "target_patterns", ()))
        if not hasattr(step, "operations") and len(sources) == len(targets) == 1:
            renamed.append((targets[0], sources[0]))
        merged = [source.split(".")[-2] for source in sources if ".experts.*." in source]
        ours = _PARTS.get(targets[0].rpartition(".")[2], ()) if targets else ()
        if len(merged) == len(ours):
            parts |= dict(zip(ours, merged, strict=True))
    return CheckpointNames(parts, tuple(reversed(renamed)))


def _listed(patterns: Any) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
