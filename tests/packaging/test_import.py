"""What `import wrapq` does to the process it is imported in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = """
import torch, wrapq
ones = torch.ones(16 << 20)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(
    not _MODES.exists() or "[madvise]" not in _MODES.read_text(),
    reason="the system gives nobody or everybody large pages",
)
@pytest.mark.parametrize("given", [None, "0"])
def test_large_tensors_are_in_large_pages_unless_the_user_says_no(given: str | None):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if given is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = given
    done = subprocess.run([sys.executable, "-c", _HUGE], env=environment, capture_output=True, text=True, check=True)
    kibibytes = int(done.stdout)
    assert kibibytes == 0 if given else kibibytes > 32 << 10  # of 64 MiB
