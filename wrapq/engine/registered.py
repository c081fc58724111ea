"""A finished run as a model of MLflow: what its registry hands out by name and alias, and `mlflow.pyfunc` loads."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from wrapq.errors import ModelError, reason_of
from wrapq.recipe.schema import Settings
from wrapq.redact import redact
from wrapq.runs import checkpoint
from wrapq.runtime.kernel import REFERENCE
from wrapq.tracking.stores import store_uri

MLMODEL = "MLmodel"
_SCHEMES = ("models:/", "runs:/")
_IDS = "input_ids"


def mlmodel(vocabulary: int | None, facts: Mapping[str, Any]) -> str:
    """The file by which MLflow knows a run's folder for a model: a function of `input_ids` [B, T] whose result are the
    logits [B, T, V], and `facts` of it."""
    ids = {"name": _IDS, "type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1, -1]}}
    logits = {"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, -1, vocabulary or -1]}}
    inputs, outputs = (json.dumps([tensor]) for tensor in (ids, logits))
    function = {"loader_module": __name__, "python_version": platform.python_version()}
    flavors = {"python_function": function, "wrapq": dict(facts)}
    return yaml.safe_dump({"flavors": flavors, "signature": {"inputs": inputs, "outputs": outputs}}, sort_keys=False)


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    runtime: str = REFERENCE,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The quantized model that a run left, or entered in MLflow's model registry.

    Args:
        path: the folder of a finished run; or `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/model`, looked
            up where MLflow was told to (`MLFLOW_TRACKING_URI`), else in the store of the outputs folder.
        device: where the model shall run.
        runtime: `reference` gives the outputs that were measured, to the bit; `auto` or the name of a kernel is faster
            and gives those of the kernels' arithmetic: see `wrapq.runtime.choose_kernels`.
        trust_remote_code: whether code that comes with the model, which its configuration names, may run.

    Raises:
        UnknownNameError: no kernel has the name `runtime`.
        ModelError: the folder is not that of a finished run, its files do not belong together, or there is no such
            model in the registry.
    """
    if not str(path).startswith(_SCHEMES):
        return checkpoint.load(path, device, runtime, trust_remote_code)
    import mlflow
    from mlflow.artifacts import download_artifacts

    store = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else store_uri(Settings())
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = download_artifacts(str(path), dst_path=scratch, tracking_uri=store, registry_uri=store)
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            raise ModelError(f"{path} is not to be had from {redact(store)}: {redact(reason_of(error))}") from error
        return checkpoint.load(folder, device, runtime, trust_remote_code)


class RegisteredModel:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def predict(self, given: Mapping[str, np.ndarray], params: Mapping[str, Any] | None = None) -> np.ndarray:
        """The logits, float32 [B, T, V], for token ids [B, T] under `input_ids`."""
        ids = torch.from_numpy(np.ascontiguousarray(given[_IDS])).to(next(self.model.parameters()).device)
        with torch.no_grad():
            return np.asarray(self.model(input_ids=ids).logits.float().cpu().numpy())


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> RegisteredModel:
    """As MLflow calls it; `model_config` may hold `device`, `runtime` and `trust_remote_code` of `wrapq.load`."""
    return RegisteredModel(checkpoint.load(path, **(model_config or {})))
