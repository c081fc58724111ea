"""The tracker of a run in the store of a test's folder `outputs`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.local import settings
from wrapq.tracking.mlflow import MLflowTracker, make_tracker


@pytest.fixture
def tracker(outputs: Path) -> Iterator[MLflowTracker]:
    made = make_tracker(settings(outputs))
    assert isinstance(made, MLflowTracker)
    yield made
    made.finish()
