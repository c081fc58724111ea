"""The calls on an MLflow store, one method per kind of record; everything MLflow-specific is here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrapq.tracking.base import TrackingError
from wrapq.tracking.redact import redact
from wrapq.tracking.stores import artifact_location

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY_LENGTH = 250
MESSAGE_LENGTH = 400  # some of these messages hold a manual
# Defaults for this process, where the user has not set them. A server that went away blocks one call for minutes with
# MLflow's own values; usage statistics are not ours to send; addresses are printed by our own table.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def load_mlflow() -> None:
    """Import what a run needs of MLflow, quiet and without usage statistics."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow.tracking  # noqa: F401

    for name in ("mlflow.store.db.utils", "alembic"):  # they announce each new table, and print what they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Store:
    """One run in one store, through a client of its own: MLflow's global state is neither read nor changed."""

    def __init__(self, uri: str, experiment: str, outputs: Path) -> None:
        self.uri, self.experiment, self.outputs = uri, experiment, Path(outputs)
        self.run_id: str | None = None
        self.run_url: str | None = None
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The open client; raises `TrackingError` before `open`."""
        if self._client is None:
            raise TrackingError("the tracking store is not open")
        return self._client

    def open(self, name: str, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Open the store, find or create the experiment, create the run or open `run_id` again.

        Raises:
            TrackingError: the store cannot be opened.
        """
        from mlflow import MlflowClient

        try:
            self._make_folder()
            with _one_at_a_time(self._database_file()):  # two processes must not both create the tables
                self._client = MlflowClient(tracking_uri=self.uri)
                experiment = self._experiment_id()
            self.run_id = self._reopen(run_id) if run_id else None
            if self.run_id is None:
                self.run_id = self._client.create_run(experiment, tags=dict(tags), run_name=name).info.run_id
        except TrackingError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            raise TrackingError(
                f"cannot open the tracking store {redact(self.uri)!r}: {_first_line(error)}\n"
                "    check tracking.uri, or run without tracking: tracking.enabled=false"
            ) from error
        if self.uri.startswith(("http://", "https://")):
            self.run_url = f"{redact(self.uri.rstrip('/'))}/#/experiments/{experiment}/runs/{self.run_id}"

    def params(self, values: Mapping[str, str]) -> None:
        """Record at most 100 parameters."""
        from mlflow.entities import Param

        self.client.log_batch(self._run, params=[Param(k, v) for k, v in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        """Record at most 100 tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self._run, tags=[RunTag(k, v) for k, v in values.items()])

    def metrics(self, points: list[tuple[str, float, int]], time: int) -> None:
        """Record at most 1,000 points (key, value, step); sending one again with the same time changes nothing."""
        from mlflow.entities import Metric

        self.client.log_batch(self._run, metrics=[Metric(key, value, time, step) for key, value, step in points])

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record a data set input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        described = json.dumps({"uri": source})
        dataset = Dataset(name, digest, "wrapq", described, profile=json.dumps(profile, default=str))
        self.client.log_inputs(self._run, [DatasetInput(dataset, [InputTag(k, v[:500]) for k, v in tags.items()])])

    def artifact(self, path: str, folder: str | None) -> None:
        """Copy a file, or a folder's content, to the run's artifacts."""
        if Path(path).is_dir():
            self.client.log_artifacts(self._run, path, folder or Path(path).name)
        else:
            self.client.log_artifact(self._run, path, folder)

    def text(self, name: str, content: str) -> None:
        """Write a text artifact."""
        self.client.log_text(self._run, content, name)

    def finish(self, status: str, time: int) -> None:
        """Close the run."""
        self.client.set_terminated(self._run, status, time)

    @property
    def _run(self) -> str:
        if self.run_id is None:
            raise TrackingError("the run is not open")
        return self.run_id

    def _database_file(self) -> Path | None:
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def _make_folder(self) -> None:
        database = self._database_file()
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)

    def _reopen(self, run_id: str) -> str | None:
        """Mark a run as going on; None when the store does not hold it."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return None
        return run_id

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self.client.create_experiment(self.experiment, artifact_location(self.uri, self.outputs))
            except MlflowException:  # another process created it since
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment {self.experiment!r} was deleted: choose another name with tracking.experiment=..., "
                f"or restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        return found.experiment_id


def entity_key(key: str) -> str:
    """`key` as MLflow accepts it: other characters become `_`, a key beyond the limit ends in a short digest."""
    clean = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", key)).lstrip("/.") or "_"
    if len(clean) <= KEY_LENGTH:
        return clean
    return f"{clean[: KEY_LENGTH - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def entity_value(text: str, limit: int) -> str:
    """`text` within `limit` characters; one that is cut says how long it was."""
    note = f" ... [cut, {len(text)} characters]"
    return text if len(text) <= limit else text[: limit - len(note)] + note


@contextlib.contextmanager
def _one_at_a_time(database: Path | None) -> Iterator[None]:
    """Hold a lock beside a database file, where the system has file locks; without a file there is nothing to lock."""
    if database is None or os.name == "nt":
        yield
        return
    import fcntl

    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")[:MESSAGE_LENGTH]
