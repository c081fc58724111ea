"""No name twice: whoever reads or searches one finds one thing."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.architecture.source import modules

OF_EVERY_FOLDER = {"__init__.py", "base.py"}


def repeated(named: list[tuple[str, str]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, place in named:
        places[name].append(place)
    return {name: at for name, at in places.items() if len(at) > 1}


def test_no_file_name_twice() -> None:
    twice = repeated([(m.path.rpartition("/")[2], m.path) for m in modules()])
    assert twice.keys() <= OF_EVERY_FOLDER, twice


def test_no_class_name_twice() -> None:
    classes = [(m, n) for m in modules() for n in m.tree.body if isinstance(n, ast.ClassDef)]
    twice = repeated([(node.name, m.at(node)) for m, node in classes])
    assert not twice, twice
