"""One owner at a time, who says who it is and loses what it has with its life."""

from __future__ import annotations

import os

import pytest

from tests import forked
from tests.faults.runs import wait
from wrapq.ownership import InUseError, own
from wrapq.runs.folder import RunFolder

HELD = r"is in use by process {} on \S+, since \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d"


@pytest.mark.parametrize("end", ["released", "killed"])
def test_the_next_one_gets_what_the_first_gave_up(tmp_path, end: str) -> None:
    program = (
        "import time; from pathlib import Path; from wrapq.runs.folder import RunFolder\n"
        f"owner = RunFolder(Path({str(tmp_path)!r})).own(); Path({str(tmp_path / 'mine')!r}).touch()\n"
        + ("owner.lock.release()" if end == "released" else "time.sleep(600)")
    )
    holder = forked.start(["-c", program], tmp_path, [tmp_path / "said", tmp_path / "errors"])
    wait((tmp_path / "mine").exists, 60)
    if end == "killed":
        with pytest.raises(InUseError, match=HELD.format(holder.pid)):
            RunFolder(tmp_path).own()
        holder.kill()
    holder.join()
    with RunFolder(tmp_path).own():
        pass


def test_two_owners_in_one_process_are_two(tmp_path) -> None:
    with RunFolder(tmp_path).own(), pytest.raises(InUseError, match=HELD.format(os.getpid())):
        RunFolder(tmp_path).own()
    with RunFolder(tmp_path).own():
        pass


def test_a_holder_that_says_nothing_hides_nothing(tmp_path) -> None:
    with own(tmp_path / "lock", "it"):
        (tmp_path / "lock.holder").unlink()
        with pytest.raises(InUseError, match="it is in use by another process"):
            own(tmp_path / "lock", "it")
