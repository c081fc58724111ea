"""Small damages to good files, each decided by a random generator: to data, to text, to bytes, to tensor files."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if depth % 2 else [value]
    return value


NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "0",
        "-1",
        "1e3",
        "null",
        "true",
        "nan",
        "float32",
        "cuda:99",
        "int4",
        "int8:channel:sym",
        "int99:g0",
    ),
    *(
        "../../out",
        "/",
        "/dev/null",
        "~",
        "~nobody_here/x",
        "wrapq://nothing",
        "a/b",
        "self.py",
        "*",
        "re:(",
        "-1:",
        "%",
    ),
    *(
        "\0",
        "\ud800",
        "\u202e",
        "\x1b[31m",
        "æøå 漢字",
        "${oops}",
        "${oc.env:HOME}",
        "???",
        "a: b",
        "[",
        "{",
        "a" * 5000,
    ),
    "!!python/object/apply:os.mkdir [ran]",
)
ODD = (
    None,
    True,
    False,
    *NUMBERS,
    *TEXTS,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": [1]}},
    _nested(20),
    _nested(60),
)
"""What no key takes, or only some do."""


def damaged_data(data: Any, random: Random, times: int | None = None) -> Any:
    """A copy of plain data with one value or several replaced, dropped, renamed, moved, changed or added."""
    data = copy.deepcopy(data)
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return _odd(random)
        holder, key = random.choice(places)
        other, there = random.choice(places)
        change, kind = random.randrange(14), type(holder[key])
        if change < 3:
            holder[key] = _odd(random)
        elif change > 9:  # another value of the same type, which gets further
            same = [v[k] for v, k in places if type(v[k]) is kind] + [v for v in ODD if type(v) is kind]
            holder[key] = copy.deepcopy(random.choice(same))
        elif change == 3:
            holder[key] = random.choice(NUMBERS)
        elif change == 4:
            del holder[key]
        elif change == 5:
            holder[key] = copy.deepcopy(other[there])
        elif change == 6 and isinstance(holder, dict):
            holder[random.choice((f"{key}x", str(key)[:-1], random.choice(TEXTS)))] = holder.pop(key)
        elif change == 7:
            holder[key] = random.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
        elif change == 8 and isinstance(holder[key], int | float):
            holder[key] = random.choice((-holder[key], holder[key] + 1, holder[key] * 1000, holder[key] / 3))
        elif isinstance(holder, dict):
            holder[random.choice(("", "x", random.choice(TEXTS)))] = _odd(random)
        else:
            holder.insert(key, _odd(random))
    return data


def _odd(random: Random) -> Any:
    return copy.deepcopy(random.choice(ODD))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    left = [data]
    while left:
        holder = left.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            left.append(holder[key])


def damaged_text(text: str, random: Random) -> str:
    """Text with a piece cut, doubled, swapped, or something odd put in."""
    start, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + random.choice((1, 1, 10, 1000)))
    lines = text.splitlines(keepends=True)
    line = random.randrange(len(lines)) if lines else 0
    return random.choice(
        (
            text[:start],
            text[:start] + text[end:],
            text[:start] + str(random.choice(TEXTS)) + text[end:],
            text[:start] + random.choice("[{(") * 3000 + text[start:],
            text[:start] + random.choice("{}[]\",:'\\\t\n#&*!|>%@`\0") + text[start:],
            "".join([*lines[:line], *lines[line : line + 1] * 2, *lines[line + 1 :]]),
        )
    )


def damaged_bytes(raw: bytes, random: Random) -> bytes:
    """Bytes with some flipped, cut, put in or doubled."""
    start, size = random.randrange(len(raw) + 1), random.choice((1, 2, 8, 100, 4096))
    some = random.choice((bytes(size), b"\xff" * size, random.randbytes(size)))
    early = start % 200
    cut, put = (raw[:start], raw[:start] + raw[start + size :]), (raw[:start] + some + raw[start:], raw + some)
    over = (raw[:start] + some + raw[start + size :], raw[:early] + some + raw[early + size :])
    return random.choice((*cut, *put, *over))


def damaged_json(raw: bytes, random: Random) -> bytes:
    """A JSON file, its data damaged or its text."""
    return _damaged_document(raw, random, json.loads, json.dumps)


def damaged_yaml(raw: bytes, random: Random) -> bytes:
    """A YAML file, its data damaged or its text; what it begins with, as comments, is kept."""
    import yaml

    lines = raw.decode().splitlines(keepends=True)
    head = "".join(line for line in lines if line.startswith("#"))
    dump = lambda data: head + yaml.dump(data, allow_unicode=random.random() < 0.5, sort_keys=False)  # noqa: E731
    return _damaged_document(raw, random, lambda text: yaml.load(text, Loader=yaml.CSafeLoader), dump)


def _damaged_document(raw: bytes, random: Random, load: Callable[[str], Any], dump: Callable[[Any], str]) -> bytes:
    text, kind = raw.decode(), random.random()
    if kind < 0.05:
        return damaged_bytes(raw, random)
    text = damaged_text(text, random) if kind < 0.2 else dump(damaged_data(load(text), random))
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(raw: bytes, random: Random) -> bytes:
    """A safetensors file: its header's data or text, the header's length, or the bytes of all damaged."""
    length = int.from_bytes(raw[:8], "little")
    header, tensors, kind = raw[8 : 8 + length], raw[8 + length :], random.random()
    if kind < 0.25:
        return damaged_bytes(raw, random)
    if kind < 0.35:
        return struct.pack("<Q", random.choice((0, 1, length - 1, length + 1, 10**8 + 1, 2**63, 2**64 - 1))) + raw[8:]
    if kind < 0.8:
        header = json.dumps(_damaged_header(json.loads(header), random)).encode("utf-8", "surrogatepass")
    else:
        header = damaged_json(header, random)
    return struct.pack("<Q", len(header)) + header + tensors


def _damaged_header(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """The header with one tensor or two described otherwise, in ways that a reader may take for right."""
    names = [name for name in header if name != "__metadata__"]
    for name in random.sample(names, min(len(names), random.choice((1, 2)))):
        facts = header[name]
        change = random.randrange(6)
        if change == 0:
            facts["dtype"] = random.choice(
                ("F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "Q9")
            )
        elif change == 1:
            facts["shape"] = random.choice((facts["shape"][::-1], [*facts["shape"], 1], facts["shape"][1:], [0], []))
        elif change == 2:
            facts["shape"] = [random.choice(NUMBERS) for _ in facts["shape"]]
        elif change == 3:
            facts["data_offsets"] = random.choice(([0, 0], [0, 4], facts["data_offsets"][::-1], [2**62, 2**62 + 4]))
        elif change == 4:
            header[random.choice((f"{name}x", name.replace("0", "1"), name[6:], "lm_head.weight"))] = header.pop(name)
        else:
            del header[name]
    return header
