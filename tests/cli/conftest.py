"""The command line in this process, from a folder of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.models import without_weights
from wrapq.cli import main


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs `wrapq` with the given arguments; `work` below the temporary folder is the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: CliRunner().invoke(main, arguments)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A model of six layers that has everything but weights: what reads them fails."""
    return without_weights(tmp_path / "weightless", num_hidden_layers=6)
