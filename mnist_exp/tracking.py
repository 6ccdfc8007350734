"""A run's record in MLflow. The only module that imports mlflow."""

import http.client
import logging
import os
import sqlite3
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from mnist_exp.errors import ConfigError

if TYPE_CHECKING:  # the verbs that only look into a store do without it
    import torch

log = logging.getLogger(__name__)

STATUSES = ("FINISHED", "FAILED", "KILLED")
_ENVIRONMENT = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
SEND_EVERY = 5.0  # seconds; a write takes 10 ms of a core, and an epoch may take 100
_METRICS_A_BATCH = 1000  # MLflow's limit
_PARAMS_A_BATCH = 100  # MLflow's limit
_PARAM_LENGTH = 6000  # MLflow's limit


def store_uri(asked: str | None, root: Path) -> str:
    """MLFLOW_TRACKING_URI if set, else what was asked for, else SQLite under `root`."""
    return os.environ.get(_ENVIRONMENT) or asked or f"{_SQLITE}{root / 'mlflow.db'}"


def check_store(uri: str) -> None:
    """Raises ConfigError for a store that cannot be opened, as far as a look can tell.

    Takes no import of mlflow, and creates nothing.
    """
    if uri.startswith("sqlite:") and (not uri.removeprefix(_SQLITE) or "?" in uri or
                                      not uri.startswith(_SQLITE)):  # fmt: skip
        raise ConfigError(f"{_said(uri)}: must name a file, sqlite:////ABSOLUTE/PATH.db")
    if uri.startswith(_SQLITE):
        _check_sqlite(uri, Path(uri.removeprefix(_SQLITE)))
    elif uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=3).close()
        except urllib.error.HTTPError as answer:  # somebody is there: mlflow will find out who
            answer.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"{_said(uri)}: no MLflow server answers there ({reason}). Start it, or "
                f"choose another store: tracking.uri=sqlite:////ABSOLUTE/PATH.db"
            ) from error
    elif "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"{_said(uri)}: MLflow no longer keeps runs in plain folders. Use "
            f"sqlite:////ABSOLUTE/PATH.db, or the http(s) address of a server"
        )


def _check_sqlite(uri: str, path: Path) -> None:
    def fail(reason: str) -> None:
        raise ConfigError(
            f"{_said(uri)}: cannot be opened, {reason}. Choose another store: "
            f"tracking.uri=sqlite:////ABSOLUTE/PATH.db"
        )

    if not path.parent.is_dir():
        fail(f"there is no folder {path.parent}")
    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            fail(f"the folder {path.parent} cannot be written")
        return
    if path.is_dir():
        fail("it is a folder")
    if not os.access(path, os.R_OK | os.W_OK):
        fail("the file cannot be read and written")
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        fail(str(error))


def has_runs(uri: str) -> bool:
    """Whether the store may hold a run; a database that was never made does not."""
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


def _said(uri: str) -> str:
    """How the store was chosen, for messages: what would have to be changed."""
    return f"{_ENVIRONMENT if os.environ.get(_ENVIRONMENT) else 'tracking.uri'}={uri}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def preload() -> None:
    """Imports mlflow, for processes that are forked from this one: it takes seconds."""
    import mlflow  # noqa: F401


class Store:
    """An MLflow store, opened. Raises ConfigError where it cannot be."""

    def __init__(self, uri: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # a connection to SQLite must not be used on both sides of a fork: none is kept open
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        import mlflow

        for name in ("mlflow", "alembic"):  # its import sets them up
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        asked = os.environ.get(_ENVIRONMENT)
        mlflow.set_tracking_uri(uri)
        # which also sets the variable, and store_uri() would take this store for the next run's
        if asked is None:
            os.environ.pop(_ENVIRONMENT, None)
        else:
            os.environ[_ENVIRONMENT] = asked
        try:
            with self._lock():
                self.client = mlflow.MlflowClient(uri)
                self.client.search_experiments(max_results=1)
        except Exception as error:  # whatever the driver of this kind of store raises
            raise ConfigError(f"{_said(uri)}: cannot be opened, {_first_line(error)}") from error

    def _lock(self) -> AbstractContextManager[object]:
        """One process at a time: MLflow does not guard its making of a new database's tables."""
        if not self.uri.startswith(_SQLITE):
            return nullcontext()
        return FileLock(self.uri.removeprefix(_SQLITE) + ".lock")

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, made if it is not there."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = None  # a server keeps artifacts where it was told to
            if self.uri.startswith(_SQLITE):
                folder = Path(self.uri.removeprefix(_SQLITE)).resolve().parent / "mlruns"
                location = folder.as_uri()
            try:
                kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view of it
                return str(self.client.create_experiment(name, location, kind))
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise ConfigError(
                f"tracking.experiment={name}: it was deleted. Choose another name, or restore it: "
                f"MLFLOW_TRACKING_URI={self.uri} "
                f"mlflow experiments restore -x {found.experiment_id}"
            )
        return str(found.experiment_id)

    def start_run(self, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        """The id of a new run in the experiment of this id."""
        run = self.client.create_run(experiment, tags=dict(tags), run_name=name)
        return str(run.info.run_id)

    def _search(self, condition: str = "", newest: bool = False) -> list[Any]:
        """Runs of all experiments, newest first; `newest`: a page of them will do."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        page, runs = None, []
        while True:
            page = self.client.search_runs(
                experiments, condition, order_by=["attributes.start_time DESC"], page_token=page
            )
            runs += page
            if newest or not (page := page.token):
                return runs

    def get(self, run_id: str) -> Any:
        """A run as MLflow has it."""
        return self.client.get_run(run_id)

    def delete(self, run_id: str) -> None:
        """Takes a run out of every list."""
        self.client.delete_run(run_id)

    def children(self, parent: str) -> list[Any]:
        """The runs of a sweep, as MLflow has them, by the number of their job."""
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        return sorted(runs, key=lambda r: int(r.data.tags.get("job", 0)))

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """The points of a metric: (step, value)."""
        return [(m.step, m.value) for m in self.client.get_metric_history(run_id, key)]

    def find(self, word: str, sweep: bool | None = False) -> Any:
        """The run that a person means: `last`, a run id, or the beginning of just one.

        sweep: whether it is to be the parent run of a sweep, or one that trains; None: either.
        """
        kind = "sweep" if sweep else "run"
        is_kind = "tags.sweep = 'true'" if sweep else ""
        runs = self._search(is_kind, newest=word == "last")
        if sweep is False:
            runs = [r for r in runs if "sweep" not in r.data.tags]
        if not runs:
            words = "train -m optimizer.lr=0.01,0.1" if sweep else "train"
            raise ConfigError(
                f"{self.uri}: it holds no {kind}s yet. To make one: mnist-exp {words}"
            )
        matching = [r for r in runs if r.info.run_id.startswith(word)]
        if word == "last":
            matching = runs[:1]
        if not matching:
            newest = ", ".join(r.info.run_id[:8] for r in runs[:5])
            raise ConfigError(
                f"{word}: there is no such {kind} in {self.uri}. {kind.upper()} is last, a run id "
                f"or its beginning; the newest: {newest}"
            )
        if len(matching) > 1:
            ids = ", ".join(r.info.run_id[:12] for r in matching[:5])
            raise ConfigError(f"{word}: {len(matching)} {kind}s begin like this: {ids}")
        return matching[0]

    def fetch(self, run_id: str, artifact: str, folder: Path) -> Path:
        """A copy of a run's artifact. Raises ConfigError if the run has none of this name."""
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run_id, artifact, str(folder)))
        except (MlflowException, OSError) as error:
            raise ConfigError(f"run {run_id}: it has no artifact {artifact}") from error


@dataclass(frozen=True)
class DatasetFacts:
    """What a run's record says of its dataset."""

    name: str
    source: str
    digest: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]  # split -> images


class Tracker:
    """The record of one run."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.client, self.run_id = store.client, run_id
        self._waiting: list[Any] = []  # metric points
        self._sent = 0.0

    def params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        for first in range(0, len(entries), _PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=entries[first : first + _PARAMS_A_BATCH])

    def dataset(self, facts: DatasetFacts) -> None:
        """The dataset, as MLflow's dataset input of the run."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=facts.name,
            digest=facts.digest[:32],  # MLflow's limit is 36
            source_type="local",
            source=json.dumps({"uri": facts.source}),
            profile=json.dumps({"image": list(facts.shape), **facts.sizes}),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("sha256", facts.digest)]
        self.client.log_inputs(self.run_id, [DatasetInput(entity, tags)])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points that the store has within seconds: an epoch may be hardly longer than a write."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(key, value, now, step) for key, value in values.items()]
        if time.monotonic() - self._sent > SEND_EVERY:
            self.flush()

    def flush(self) -> None:
        """Sends the points that wait."""
        for first in range(0, len(self._waiting), _METRICS_A_BATCH):
            points = self._waiting[first : first + _METRICS_A_BATCH]
            self.client.log_batch(self.run_id, metrics=points)
        self._waiting, self._sent = [], time.monotonic()

    def image(self, key: str, pixels: np.ndarray, step: int) -> None:
        """`pixels`: uint8 [H, W, 3]. One key and several steps give a slider in the UI."""
        self.client.log_image(self.run_id, pixels, key=key, step=step, synchronous=True)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def text(self, text: str, name: str) -> None:
        self.client.log_text(self.run_id, text, name)

    def tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, value)

    def model(
        self, model: "torch.nn.Module", shape: Sequence[int], classes: int, example: np.ndarray
    ) -> None:
        """The model with signature and example. example: float32 [B, C, H, W], B at least 2.

        As an exported program, which loads where this package is not; a module that cannot be
        exported (its control flow depends on values) is pickled instead.
        """
        import mlflow.pytorch
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        real = np.dtype("float32")
        signature = ModelSignature(
            Schema([TensorSpec(real, (-1, *shape))]), Schema([TensorSpec(real, (-1, classes))])
        )
        # said outright, as MLflow would load the model in another process to find out
        requirements = [f"{name}=={version(name)}" for name in ("torch", "mlflow")]
        with tempfile.TemporaryDirectory() as folder:
            try:
                mlflow.pytorch.save_model(
                    model, f"{folder}/trial", input_example=example, pip_requirements=requirements
                )
                form = "pt2"
            except Exception as error:  # torch.export raises whatever it meets
                log.warning(
                    "the model is pickled, as it cannot be exported: %s", _first_line(error)
                )
                form = "pickle"
        status = self.client.get_run(self.run_id).info.status
        # nested: whoever calls from Python may have a run of their own open
        mlflow.start_run(run_id=self.run_id, nested=True)
        try:
            mlflow.pytorch.log_model(
                model,
                name="model",
                signature=signature,
                input_example=example,
                pip_requirements=requirements,
                serialization_format=form,
            )
        finally:
            mlflow.end_run(status)  # as it was: start_run() has set it to RUNNING

    def finish(self, status: str, reason: str | None = None) -> None:
        """FINISHED, FAILED or KILLED; the reason is kept as a tag."""
        assert status in STATUSES, status
        self.flush()
        if reason:
            self.client.set_tag(self.run_id, "reason", reason[:5000])
        self.client.set_terminated(self.run_id, status)
