"""Large pages are asked for by the command line, and not by an import, which leaves its process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wrapq.large_pages import resident

_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = """
import torch
from wrapq.large_pages import use_large_pages
use_large_pages()
ones = torch.ones(16 << 20)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
_COMMAND = "from wrapq.cli import main; main(['presets'], standalone_mode=False)"


@pytest.mark.skipif(
    not _MODES.exists() or "[madvise]" not in _MODES.read_text(),
    reason="the system gives nobody or everybody large pages",
)
@pytest.mark.parametrize("given", [None, pytest.param("0", marks=pytest.mark.slow)])
def test_large_tensors_are_in_large_pages_unless_the_user_says_no(given: str | None):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if given is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = given
    done = subprocess.run([sys.executable, "-c", _HUGE], env=environment, capture_output=True, text=True, check=True)
    kibibytes = int(done.stdout)
    assert kibibytes == 0 if given else kibibytes > 32 << 10  # of 64 MiB


_FREED = """
from wrapq.large_pages import give_back, resident
kept, freed = [], []
for _ in range(20000):  # each too small to be given back by itself
    freed.append(bytearray(10000)), kept.append(bytearray(100))
before = resident()
freed.clear()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(resident() is None, reason="this C library keeps what is freed")
def test_freed_memory_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6  # of 200 MB


@pytest.mark.parametrize(("code", "expected"), [("import wrapq", None), (_COMMAND, "1")])
def test_the_command_line_asks_for_large_pages_and_an_import_does_not(code: str, expected: str | None, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    ask = f"import os\n{code}\nprint(os.environ.get('THP_MEM_ALLOC_ENABLE'))"
    command = [sys.executable, "-c", ask]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(expected)
