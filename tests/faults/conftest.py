"""What the runs of this folder are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forked
from tests.faults.runs import digests, finish, tiny, tiny_model


@pytest.fixture(scope="session")
def undisturbed_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run left that nothing happened to."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    done = finish(outputs)
    assert done.returncode == 0, done.stderr
    return outputs


@pytest.fixture(scope="session")
def undisturbed(undisturbed_outputs: Path) -> dict[str, str]:
    """The digests of that run."""
    (found,) = digests(undisturbed_outputs)
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of it that takes half a second."""
    return tiny(tmp_path_factory.mktemp("presets"))


@pytest.fixture(scope="session")
def finished(model: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    outputs = tmp_path_factory.mktemp("finished")
    done = forked.wrapq(["run", "recipe=w8a8_static", *words, f"model.path={model}", f"paths.outputs={outputs}"])
    assert done.returncode == 0, done.stderr
    (record,) = outputs.glob("w8a8_static/*/run.json")
    return record.parent
