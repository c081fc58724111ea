"""The outbox of a run: who may send from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wrapq.ownership import InUseError
from wrapq.tracking.outbox import Outbox

HOLD = """
import sys, time
from pathlib import Path
from wrapq.tracking.outbox import Outbox
with Outbox(Path(sys.argv[1])).owned():
    print("mine", flush=True)
    time.sleep(600)
"""


def test_the_right_to_send_is_one_process_at_a_time_and_dies_with_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        with pytest.raises(InUseError, match=rf"in use by process {holder.pid} on "), outbox.owned():
            pass
    finally:
        holder.kill()
        holder.wait()
    with outbox.owned(seconds=5), pytest.raises(InUseError), Outbox(tmp_path).owned():
        pass
    with outbox.owned():
        pass
