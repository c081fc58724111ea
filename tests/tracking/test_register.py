"""A finished model in MLflow's model registry, found by its alias, downloaded and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

import wrapq
from wrapq.errors import ModelError
from wrapq.tracking.outbox import Outbox, Sent
from wrapq.tracking.sync import sync


def test_a_registered_model_is_downloaded_by_its_alias_and_loads(
    new_store: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_store(tmp_path / "out" / "mlflow.db")
    place = [f"paths.outputs={tmp_path / 'out'}", "tracking.register_as={name: demo-w8, alias: candidate}"]
    result = wrapq.run("w8a16", ["evaluation.tokens=512", *place])
    uri = f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("demo-w8", "candidate")
    assert (version.version, version.run_id) in ((1, result.run_id), ("1", result.run_id))
    assert version.tags["recipe"] == "w8a16"
    assert version.tags["digest.outputs"] == result.digests["outputs"]
    copy = download_artifacts(version.source, dst_path=str(tmp_path / "copy"), tracking_uri=uri)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        here, there = (wrapq.load(folder)(input_ids=ids).logits for folder in (result.folder, copy))
    assert torch.equal(here, there)
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    given = wrapq.load("models:/demo-w8@candidate")
    with torch.no_grad():
        assert torch.equal(given(input_ids=ids).logits, here)
    function = mlflow.pyfunc.load_model("models:/demo-w8@candidate")
    assert np.array_equal(function.predict({"input_ids": ids.numpy()}), here.float().numpy())
    with pytest.raises(mlflow.MlflowException, match="input_ids"):
        function.predict({"ids": ids.numpy()})
    with pytest.raises(ModelError, match="models:/demo-w8@nobody is not to be had from sqlite"):
        wrapq.load("models:/demo-w8@nobody")
    outbox = Outbox(result.folder)  # all of it sent once more makes no second version, and no second run
    outbox.write_sent(Sent(tried=True))
    (again,) = sync(result.folder)
    assert again.left == 0
    assert len(client.search_model_versions("name='demo-w8'")) == 1
    assert outbox.sent().run_id == result.run_id
