"""The JSON schema of a recipe file, from which editors complete keys and underline mistakes.

    # yaml-language-server: $schema=recipe.schema.json

as the first line of a recipe, beside the output of `wrapq schema`, is all an editor needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from wrapq.quant.short_form import ALIASES, PARTS, PATTERN
from wrapq.quant.spec import FLOAT
from wrapq.recipe.schema import Recipe
from wrapq.recipe.spec_patch import JSON_MARK, SpecFields

Json = dict[str, Any]
_REF = "#/$defs/{model}"


def recipe_schema(
    algorithms: Mapping[str, type[BaseModel]],
    sources: Mapping[str, type[BaseModel]],
    exporters: Mapping[str, type[BaseModel]] = MappingProxyType({}),
    observers: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> Json:
    """The schema of a recipe file.

    No key is required, since a file may leave everything to the presets it names.

    Args:
        algorithms: the options of every registered algorithm, by its name.
        sources: the options of every registered data source, by its name.
        exporters: the options of every registered exporter, by its name.
        observers: the options of every registered observer, by its name.
    """
    schema = Recipe.model_json_schema(ref_template=_REF)
    defs: Json = schema["$defs"]
    defs["Spec"] = _spec_schema(defs)
    places = [("Stage", "algorithm", algorithms), ("Calibration", "source", sources), ("Evaluation", "source", sources)]
    for model, key, things in [*places, ("ObserverChoice", "name", observers)]:
        _with_options(defs, model, key, things)
    own = defs.pop("Export")["properties"]
    formats = {
        name: _closed({**own, **_properties(defs, f"Export_{name}_", options)}) for name, options in exporters.items()
    }
    schema["properties"]["export"] = {**schema["properties"]["export"], **_closed(formats)}
    defs["SpecFields"]["properties"]["observer"]["examples"] = list(observers)
    defs["ObserverComparison"]["additionalProperties"] = False
    schema["properties"] = {"defaults": _DEFAULTS, **schema["properties"]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **_loosen(schema), "title": "wrapq recipe"}


_DEFAULTS: Json = {
    "type": "array",
    "description": "The presets this recipe is made of, in order; _self_ stands for the file's own content.",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]},
    "examples": [["override /model: hf", "/scheme@rules.linear: w4a16", "/algorithm@stack.round: rtn", "_self_"]],
}


def _spec_schema(defs: Json) -> Json:
    fields = SpecFields.model_json_schema(ref_template=_REF)
    defs |= fields.pop("$defs", {})
    defs["SpecFields"] = fields
    word = {
        "type": "string",
        "description": f"{FLOAT}, or a whole spec: a dtype, or {', '.join(ALIASES)}; then its parts, in any order, "
        f"each after a colon: {', '.join(PARTS)}",
        "pattern": f"^(?:{FLOAT}|{PATTERN})$",
        "examples": [FLOAT, "int8:channel:sym", "int4:g128:sym", "int8:token:sym:dyn", "fp8_e4m3:b128x128", *ALIASES],
    }
    return {"anyOf": [word, {"$ref": "#/$defs/SpecFields"}]}


def _with_options(defs: Json, model: str, key: str, things: Mapping[str, type[BaseModel]]) -> None:
    """Let the object `model` hold the options of the thing that its `key` names, or of any thing when it names none."""
    schema = defs[model]
    own = tuple(schema["properties"])
    schema["properties"][key]["examples"] = list(things)
    chosen, merged = [], dict[str, list[Json]]()
    for name, options in things.items():
        properties = _properties(defs, f"{model}_{name}_", options)
        for option, option_schema in properties.items():
            merged.setdefault(option, []).append(option_schema)
        named = {"properties": {key: {"const": name}}, "required": [key]}
        chosen.append({"if": named, "then": {"properties": properties, "propertyNames": {"enum": [*own, *properties]}}})
    for option, schemas in merged.items():
        distinct = [s for i, s in enumerate(schemas) if s not in schemas[:i]]
        schema["properties"].setdefault(option, distinct[0] if len(distinct) == 1 else {"anyOf": distinct})
    schema["additionalProperties"] = False
    if chosen:
        schema["allOf"] = chosen


def _properties(defs: Json, prefix: str, options: type[BaseModel]) -> Json:
    """The schemas of some options by name; their inner definitions get names of their own among `defs`."""
    their = options.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
    defs |= {f"{prefix}{inner}": value for inner, value in their.get("$defs", {}).items()}
    return dict(their.get("properties", {}))


def _closed(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _loosen(node: Any, within_if: bool = False) -> Any:
    """The same schema with specs filled in and nothing required, except what an `if` asks for."""
    if isinstance(node, list):
        return [_loosen(item) for item in node]
    if not isinstance(node, dict):
        return node
    if JSON_MARK in node:
        return {"$ref": "#/$defs/Spec", **{k: v for k, v in node.items() if k != JSON_MARK}}
    kept = {k: v for k, v in node.items() if within_if or k != "required" or not isinstance(v, list)}
    return {key: _loosen(value, within_if=key == "if") for key, value in kept.items()}
