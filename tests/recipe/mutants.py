"""Recipes and presets as a careless or hostile author might write them, the same for the same seed.

Each mutant is a folder of presets and the overrides that choose from it: shipped files with keys and values exchanged,
with damaged text, with bombs, with names and links that lead elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PARTS = sorted((ROOT / "conf").glob("*/*.yaml"))
LONG = "x" * 5000
EVIL = "../../../../evil"
VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**30, 1e308, float("nan"), float("inf"), "", " ", "\t", "\u202e\u0000"[:1],
    "é" * 40, LONG, EVIL, "/etc/passwd", "~", "~root/x", "file:///etc/passwd", "http://127.0.0.1:9/x",
    "${oc.env:HOME}", "${name}", "${name}" * 50, "${a.b.c}", "$(id)", "`id`", "!!python/name:os.system", "???",
    "int4:g128:sym", "int4:g0", "int9999", "int4:g-1", "re:(a+)+$", "re:[", "re:" + "(" * 200, "*" * 400, "*.mlp.*",
    "lm_head", "rtn", "gptq", "__import__('os')", [], {}, [[]], [{}], {"_target_": "os.system"},
    {"a": {"b": {"c": 1}}}, ["a"] * 300, {"": 1}, {".": 1}, {"a.b": 1}, "0:8", ":", "9" * 400, "-99999999999",
    {"match": {"name": "*"}, "weight": "int4"}, {"match": None}, "conf", "demo", "wrapq://../../x",
    "wrapq://demo/../..", "wrapq://", "a\nb", "{x", "%s%n", "{0.__class__}", "\ud7ff", "NaN", ".inf",
]  # fmt: skip
KEYS: list[Any] = [
    "name", "description", "model", "path", "dtype", "tokenizer", "revision", "rules", "stack", "stack_order",
    "match", "calibration", "evaluation", "export", "seed", "weight", "input", "output", "activations", "points",
    "algorithm", "observer", "group_size", "granularity", "axis", "layers", "type", "damp", "samples", "seq_len",
    "batch_size", "format", "defaults", "_self_", "_target_", "__class__", "hydra", "paths", "tracking", "runtime",
    "", ".", "..", EVIL, LONG, 3, None, True, 1.5, "a b", "é", "source", "split", "schedule", "pack", "replace",
    "optional", "quantize", "compare",
]  # fmt: skip
DEFAULTS: list[Any] = [
    "_self_", "mine", "/recipe/mine", "w8a16", "/recipe/w8a16", {"/scheme@rules.linear": "w4a16"},
    {"/scheme@rules": EVIL}, {"override /model": "hf"}, {"override /runtime": "cpu"},
    {"/algorithm@stack.x": "gptq"}, {"/scheme": None}, None, 3, [], {"/scheme@rules.linear": "mine"},
    {"/scheme@a.b.c.d.e": "w8"}, {"/nothing": "x"}, "/", "//", "@", "a@b@c", "optional x",
    {"/scheme@_global_": "w8"}, {"override /recipe": "demo"}, {"/model@model.model": "demo"}, {"/scheme@": "w8"},
    LONG, "", {"override /scheme@rules.linear": "w8"}, "../x", {"a": {"b": "c"}}, {"/calibration": ["a", "b"]},
    "/scheme/w8@rules.q",
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A folder with presets, and the overrides that use them."""

    overrides: tuple[str, ...]
    presets: Path | None


def make_mutant(seed: int, folder: Path) -> Mutant:
    """Write the mutant `seed` into the empty `folder`."""
    rng = random.Random(seed)
    source = rng.choice(RECIPES if rng.random() < 0.75 else PARTS)
    raw = rng.choice(_MUTATIONS)(rng, source.read_text(encoding="utf-8"))
    raw = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    return _as_recipe(rng, raw, folder) if source in RECIPES else _as_part(rng, raw, folder, source.parent.name)


def _as_recipe(rng: random.Random, raw: bytes, folder: Path) -> Mutant:
    extra = (rng.choice(_OVERRIDES)(rng),) if rng.random() < 0.3 else ()
    if rng.random() < 0.5:
        (folder / "mine.yaml").write_bytes(raw)
        return Mutant((f"recipe={folder / 'mine.yaml'}", *extra), None)
    name = rng.choice(("mine", "mine", "team/mine", "w8a16"))
    _write(rng, folder / "recipes" / f"{name}.yaml", raw)
    return Mutant((f"recipe={name}", *extra), folder)


def _as_part(rng: random.Random, raw: bytes, folder: Path, kind: str) -> Mutant:
    name = "mine"
    _write(rng, folder / "conf" / kind / f"{name}.yaml", raw)
    place = {"scheme": "scheme@rules.linear", "algorithm": "algorithm@stack.round"}.get(kind, kind)
    return Mutant(("recipe=w4a16_rtn", f"{place}={name}"), folder)


def _write(rng: random.Random, path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fate = rng.random()
    if fate < 0.03:
        path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "/dev/null", str(path), "/", "../../../../nothing")))
    elif fate < 0.04:
        path.mkdir()
    else:
        path.write_bytes(raw)


def _tree(rng: random.Random, text: str) -> str:
    """Keys and values exchanged at a few places."""
    data = yaml.safe_load(text) or {}
    for _ in range(rng.randint(1, 4)):
        _mutate_once(rng, data)
    header = "# @package _global_\n" if "defaults" in data else ""
    return header + yaml.safe_dump(data, sort_keys=False, allow_unicode=rng.random() < 0.5)


def _tuned(rng: random.Random, text: str) -> str:
    """What a careful author might change, and now and then one mistake."""
    data = yaml.safe_load(text) or {}
    for path, values in rng.sample(_TUNED, 3) if "defaults" in data else ():
        holder: Any = data
        for key in path[:-1]:
            holder = holder.setdefault(key, {})
        holder[path[-1]] = rng.choice(values)
    if rng.random() < 0.4:
        _mutate_once(rng, data)
    return yaml.safe_dump(data, sort_keys=False)


_TUNED: list[tuple[tuple[str, ...], list[Any]]] = [
    (("rules", "linear", "match"), [{"type": "Linear"}, {"name": "*_proj"}, {"type": "Linear", "layers": "1:"}]),
    (("rules", "linear", "weight"), ["int4:g64:sym", "int8:channel", {"observer": "mse"}, "nvfp4", "fp8_e4m3:channel"]),
    (("rules", "linear", "quantize"), [True, False]),
    (("rules", "down"), [{"match": {"name": "*.down_proj"}, "weight": "int8:channel:sym"}, {"match": {"layers": -1}}]),
    (("stack", "round", "algorithm"), ["rtn", "gptq", "seqmse", "ranges"]),
    (("seed",), [0, 7, -1]),
    (("description",), ["x", "é" * 40, ""]),
    (("evaluation", "tokens"), [256, 1, 10**9]),
    (("evaluation", "seq_len"), [64, 1, 10**9]),
]


def _mutate_once(rng: random.Random, data: dict[Any, Any]) -> None:
    holder: Any = data
    while (below := [v for v in _children(holder) if isinstance(v, dict | list) and v]) and rng.random() < 0.7:
        holder = rng.choice(below)
    if isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(DEFAULTS if rng.random() < 0.8 else VALUES))
    elif rng.random() < 0.6 and holder:
        holder[rng.choice(list(holder))] = rng.choice(VALUES)
    else:
        holder[rng.choice(KEYS)] = rng.choice(VALUES)


def _children(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


def _damaged(rng: random.Random, text: str) -> bytes:
    """Bytes dropped, repeated and put in."""
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.choice((0, 0, 1, 10))] = rng.choice(_JUNK) * rng.choice((1, 1, 3))
    return bytes(raw)


_JUNK = [piece.encode("latin-1") for piece in ("\0", "\xff", "\xed\xa0\x80", "\t", "\r", *"{[&*!'\"|%>", ": ", "- ")]


def _encoded(rng: random.Random, text: str) -> bytes:
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7", "cp037")))


def _bomb(rng: random.Random, text: str) -> str:
    deep = rng.choice((31, 40, 3000))
    rules = "".join(f"  r{i}: {{match: {{name: '*{i}*'}}, optional: true, weight: int8}}\n" for i in range(60))
    bombs = [
        "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30)),
        f"{text}\nzz: {'[' * deep}{']' * deep}\n",
        f"{text}\nzz: {'{a: ' * deep}1{'}' * deep}\n",
        text + "\n" + "".join(f"k{i}: {i}\n" for i in range(5000)),
        text.replace("rules:\n", f"rules:\n{rules}"),
        f"{text}\nzz: {'y' * (2 << 20)}",
        "defaults:\n" + "".join(f"  - /scheme@rules.r{i}: w8\n" for i in range(120)) + "  - _self_\n",
        f"{text}\n---\n{text}",
    ]
    return rng.choice(bombs)


def _cyclic(rng: random.Random, text: str) -> str:
    entry = rng.choice(("mine", "/recipe/mine", "team/mine", "mine@a", "/recipe/mine@rules", "/scheme/mine", "./mine"))
    return f"# @package _global_\ndefaults:\n  - {entry}\n  - {entry}@b\n  - _self_\nname: x\n"


_MUTATIONS: list[Callable[[random.Random, str], str | bytes]] = [
    *([_tree] * 5), *([_tuned] * 6), _damaged, _damaged, _encoded, _bomb, _cyclic
]  # fmt: skip
_OVERRIDES: list[Callable[[random.Random], str]] = [
    lambda rng: f"{rng.choice(('', '+', '++', '~'))}{rng.choice(KEYS)}={rng.choice(VALUES)}",
    lambda rng: f"rules.linear.{rng.choice(KEYS)}={rng.choice(VALUES)}",
    lambda rng: f"+rules.{rng.choice(KEYS)}={rng.choice(VALUES)}",
    lambda rng: f"name={rng.choice(VALUES)}",
    lambda rng: f"model.path={rng.choice(VALUES)}",
    lambda rng: f"recipe={rng.choice(VALUES)}",
    lambda rng: rng.choice(("\0", "=", "a=\0", LONG, "~", "@", "+=", "a.b@c=d", "a=${", "'", '"', "a={b:", "é=é")),
]
