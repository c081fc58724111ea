"""One word per thing: retired words name nothing in the package. docs/developing.md has the glossary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.source import Module, modules

RETIRED = {
    "blockwise": "block reconstruction, or a streaming checkpoint",
    "border": "a block checkpoint",
    "borders": "block checkpoints",
    "decided": "finalized",
    "decider": "a finalizer",
    "feed": "a channel edge",
    "feeds": "channel edges",
    "follower": "a channel tracer",
    "gates": "barriers",
    "its": "the thing whose it is",
    "keeper": "a checkpoint, a store or a cache",
    "lockstep": "the scheduler",
    "meet": "a hook: on_activation, on_weight_input",
    "reader": "a consumer",
    "readers": "consumers",
    "recall": "a cache",
    "residency": "a block loader",
    "said": "what it is that was said",
    "shelf": "a store or a cache",
    "slot": "a weight layout",
    "slots": "weight layouts",
    "surgeon": "a graph rewriter",
    "surgery": "graph rewriting",
    "twin": "the float reference forward",
    "twins": "float reference forwards",
}
"""Words that are no part of any name, and what to say instead."""
RETIRED_FOR_CLASSES = {
    "gate": "a barrier",
    "leaf": "a layer",
    "mark": "a channel tag",
    "once": "a single-use hook",
    "stop": "a barrier",
    "stream": "a residual stream",
}
"""Ordinary words that named classes of another kind."""
ORDINARY = {
    "feeds": ("wrapq.algorithms.smoothquant",),  # an option of recipes
    "leaf": ("wrapq.wrappers.leaf",),  # a module without children, as torch says it
    "reader": ("wrapq.export", "wrapq.recipe.yaml_reader"),  # what reads a file
    "stream": ("wrapq.graph",),  # of the residual stream
}
"""Where a retired word has its ordinary meaning."""


def names(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Every name that the module gives to something of its own."""
    yield module.name.rpartition(".")[2], module.tree
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node


def words(name: str) -> list[str]:
    """`run_lockstep` and `FloatTwin` in lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def retired(module: Module) -> Iterator[str]:
    for name, node in names(module):
        known = RETIRED | (RETIRED_FOR_CLASSES if isinstance(node, ast.ClassDef) else {})
        for word in words(name):
            if word in known and not module.name.startswith(ORDINARY.get(word, ())):
                yield f"{module.at(node)}: {name}: '{word}' is retired; say what it is: {known[word]}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (ast.get_docstring(node) or "").startswith("See `"):
            yield f"{module.at(node)}: {name}: the docstring only refers elsewhere; leave it out or say it"


def test_no_retired_word_names_anything() -> None:
    found = [line for module in modules() for line in retired(module)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("class FloatTwin: ...", "twin"),
        ("class Gate: ...", "gate"),
        ("def run_lockstep(): ...", "lockstep"),
        ("def f(its): ...", "its"),
        ("said, x = 1, 2", "said"),
        ("self.recall = 1", "recall"),
    ],
)
def test_a_retired_word_is_found(text: str, word: str) -> None:
    (line,) = retired(Module("wrapq.m", "wrapq/m.py", ast.parse(text), 1))
    assert f"'{word}' is retired" in line


@pytest.mark.parametrize("text", ["gate_proj = 1", "stop = 3", "class ResidualStreams: ...", "units = permits = 1"])
def test_ordinary_words_are_free(text: str) -> None:
    assert list(retired(Module("wrapq.m", "wrapq/m.py", ast.parse(text), 1))) == []
