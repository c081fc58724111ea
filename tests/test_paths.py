from __future__ import annotations

import os
from pathlib import Path

import pytest

from wrapq.errors import ModelError, WrapqError
from wrapq.paths import expand, refuse_devices


def test_home_folders() -> None:
    assert expand("~/x") == Path.home() / "x" and expand("x~") == Path("x~")
    for text in ("~no_such_user/x", "a\0b"):
        with pytest.raises(WrapqError, match="no path: "):
            expand(text)


def test_devices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to("nothing")
    refuse_devices(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="pipe is no file"):
        refuse_devices(tmp_path)
