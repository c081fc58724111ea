"""A contract imports no machinery: a plug-in stands on few files of wrapq, and these are counted.

The closure of a module is what Python loads of wrapq when it imports that module alone, but for `__init__.py` files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from tests.architecture.source import PACKAGE, modules

CONTRACTS = (
    "wrapq.algorithms.base",
    "wrapq.algorithms.transform",
    "wrapq.data.sources.base",
    "wrapq.export.base",
    "wrapq.metrics",
    "wrapq.observers.base",
    "wrapq.pt2e.base",
    "wrapq.runtime.kernel",
    "wrapq.sweep.launchers.base",
    "wrapq.sweep.samplers.base",
    "wrapq.tracking.base",
    "wrapq.wrappers.base",
)
LAUNCHERS = tuple(m.name for m in modules() if m.name.startswith("wrapq.sweep.launchers."))
LIMITS = {
    **dict.fromkeys(CONTRACTS, 20),
    **dict.fromkeys(LAUNCHERS, 16),
    "wrapq.algorithms.rtn": 18,
    "wrapq.algorithms.gptq": 25,
}
MEASURE = """
import importlib, json, multiprocessing, sys
import pydantic, torch  # once for all: every module is then imported by a fork of this process, which has no wrapq yet

def closure(name):
    importlib.import_module(name)
    return [n for n, module in sys.modules.items() if n.startswith("wrapq.") and not hasattr(module, "__path__")]

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps({name: pool.apply(closure, [name]) for name in sys.argv[1:]}))
"""


@cache
def closures() -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", MEASURE, *LIMITS]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_imported_with_a_contract(name: str) -> None:
    loaded = closures()[name]
    assert name in loaded, "the closure was not read"
    assert len(loaded) <= LIMITS[name], f"{name} loads {len(loaded)} files of wrapq:\n" + "\n".join(sorted(loaded))
