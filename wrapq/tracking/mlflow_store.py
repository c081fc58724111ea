"""The calls on an MLflow store, a method per kind of record; all that imports MLflow is here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from wrapq.errors import first_line
from wrapq.redact import redact
from wrapq.tracking.base import StoreAwayError, TrackingError
from wrapq.tracking.stores import artifact_location, is_remote

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "wrapq.run"
MESSAGE_LENGTH = 400  # some of these messages hold a manual
# Defaults for this process, where the user has not set them. A server that went away blocks one call for minutes with
# MLflow's own values, and trying again is the outbox's business; usage statistics are not ours to send; addresses are
# printed by our own table.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
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


class MLflowStore:
    """One run in one store, through a client of its own: MLflow's global state is neither read nor changed."""

    def __init__(self, uri: str, experiment: str, outputs: Path) -> None:
        self.uri, self.experiment, self.outputs = uri, experiment, Path(outputs)
        self.run_id = ""  # until it is open
        self.run_url: str | None = None
        self.client: MlflowClient

    def open(
        self, name: str, key: str, tags: Mapping[str, str], time: int, run_id: str | None = None, tried: bool = False
    ) -> None:
        """Open the store, find or create the experiment and the run.

        Args:
            name: what the run is called.
            key: the tag `wrapq.run`, by which a run is found whose creation was not answered.
            tags: all other tags.
            time: when the run began, in milliseconds since 1970.
            run_id: the run, where it is known.
            tried: whether creating the run was tried before.

        Raises:
            StoreAwayError: the store cannot be reached.
            TrackingError: the store refuses the run.
        """
        from mlflow import MlflowClient

        try:
            lock: Any = contextlib.nullcontext()
            if self.uri.startswith("sqlite:///"):
                database = Path(self.uri.removeprefix("sqlite:///"))
                database.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(database.with_name(f".{database.name}.lock"))
            with lock:  # two processes must not both create the tables
                self.client = MlflowClient(tracking_uri=self.uri)
                experiment = self._experiment_id()
            if run_id is None and tried:
                runs = self.client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
                run_id = runs[0].info.run_id if runs else None
            if run_id is None:
                tags = {**tags, RUN_KEY: key}
                run_id = self.client.create_run(experiment, start_time=time, tags=tags, run_name=name).info.run_id
            self.run_id = run_id
        except TrackingError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each have their own
            away = is_remote(self.uri) and not is_final(error, at_the_door=True)
            raise (StoreAwayError if away else TrackingError)(
                f"cannot open the tracking store {redact(self.uri)!r}: {_message(error)}\n"
                "    check tracking.uri, or run without tracking: tracking.enabled=false"
            ) from error
        if self.uri.startswith(("http://", "https://")):
            self.run_url = f"{redact(self.uri.rstrip('/'))}/#/experiments/{experiment}/runs/{self.run_id}"

    def call(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Call one of the methods below.

        Raises:
            StoreAwayError: the store could not be reached or could not serve; the same call may succeed later.
            TrackingError: the store will never take it.
        """
        from mlflow.exceptions import MlflowException

        try:
            try:
                getattr(self, method)(**arguments)
            except MlflowException as error:
                if error.error_code != "BAD_REQUEST":  # as MLflow calls what its database refuses
                    raise
                getattr(self, method)(**arguments)  # another run entered the same row meanwhile: now it is found
        except Exception as error:
            kind = TrackingError if is_final(error) else StoreAwayError
            raise kind(_message(error)) from error

    def log(
        self, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[tuple[str, float, int, int]]
    ) -> None:
        """Record at most 100 parameters, 100 tags and 1,000 metrics (key, value, time, step), 1,000 in all.

        What was recorded before, with the same value, time and step, is recorded once.
        """
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            self.run_id,
            metrics=[Metric(*point) for point in metrics],
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record a data set input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        described = json.dumps({"uri": source})
        dataset = Dataset(name, digest, "wrapq", described, profile=json.dumps(profile, default=str))
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag(k, v[:500]) for k, v in tags.items()])])

    def artifact(self, path: str, folder: str | None) -> None:
        """Copy a file, or a folder's content, to the run's artifacts."""
        if Path(path).is_dir():
            self.client.log_artifacts(self.run_id, path, folder or Path(path).name)
        else:
            self.client.log_artifact(self.run_id, path, folder)

    def text(self, name: str, content: str) -> None:
        """Write a text artifact."""
        self.client.log_text(self.run_id, content, name)

    def register(self, name: str, alias: str | None, description: str, tags: Mapping[str, str]) -> None:
        """Enter the run's artifact folder `model` in the model registry; a run is entered once."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it is there already; any other reason comes back just below
            self.client.create_registered_model(name)
        versions = self.client.search_model_versions(f"name='{name}'")
        version = next((version for version in versions if version.run_id == self.run_id), None)
        if version is None:
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
            version = self.client.create_model_version(name, source, self.run_id, dict(tags), description=description)
        if alias:
            self.client.set_registered_model_alias(name, alias, version.version)

    def finish(self, status: str, time: int) -> None:
        """Close the run."""
        self.client.set_terminated(self.run_id, status, time)

    def reopen(self) -> None:
        """Go on with a run that had ended."""
        self.client.update_run(self.run_id, "RUNNING")
        if "failure" in self.client.get_run(self.run_id).data.tags:
            self.client.delete_tag(self.run_id, "failure")

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                return self.client.create_experiment(self.experiment, artifact_location(self.uri, self.outputs))
            except MlflowException:  # another process created it since
                experiment = self.client.get_experiment_by_name(self.experiment)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment {self.experiment!r} was deleted: choose another name with tracking.experiment=..., "
                f"or restore it: mlflow experiments restore --experiment-id {experiment.experiment_id}"
            )
        return experiment.experiment_id


def is_final(error: Exception, at_the_door: bool = False) -> bool:
    """Whether the store will never take what it answered with `error`; all that is not known to be final may pass.

    Args:
        error: of MLflow, requests, a database driver or the file system.
        at_the_door: when a run is opened it is the user's to correct if he may not enter or nothing is there; later
            such an answer may come from whatever stands before the server.
    """
    from mlflow.exceptions import MlflowException, RestException

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    if status is not None:
        passing = {401, 403, 404, 408, 409, 429, 499} if not at_the_door else {408, 429, 499}
        if status == 404 and isinstance(error, RestException):  # MLflow itself says so: the run was deleted
            return True
        return 400 <= status < 500 and status not in passing
    return isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError | ValueError | TypeError)


def _message(error: BaseException) -> str:
    return redact(first_line(error))[:MESSAGE_LENGTH]
