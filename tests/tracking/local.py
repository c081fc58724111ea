"""A store on this machine, as the settings of a run name it."""

from pathlib import Path
from types import SimpleNamespace

from mlflow import MlflowClient


def settings(outputs: Path, enabled: bool = True, uri: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        tracking=SimpleNamespace(enabled=enabled, uri=uri, experiment="wrapq"),
        paths=SimpleNamespace(outputs=str(outputs)),
    )


def client(outputs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{outputs / 'mlflow.db'}")
