"""A run's record in MLflow. The only module that imports mlflow."""

import contextlib
import functools
import glob
import http.client
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from mnist_exp.errors import ConfigError, first_line
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking import ui_view as view
from mnist_exp.tracking.journal import Entry, OpenRuns
from mnist_exp.tracking.run_log import RunHistory

if TYPE_CHECKING:  # what only looks into a store does without them
    import numpy as np
    import torch

log = logging.getLogger(__name__)
T = TypeVar("T")

PARENT = "mlflow.parentRunId"  # the tag of a run that belongs to a sweep
RUN_KEY = "run_key"  # the tag that tells which journal a run is made from
_DELIVERED = ".delivery.json"
ENVIRONMENT = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_SERVED = ("postgresql", "mysql", "mssql", "databricks")  # beginnings of other addresses
_METRICS_A_BATCH = 1000  # MLflow's limit, for all that is in a call
_PARAMS_A_BATCH = 100  # MLflow's limit, for tags as well
_PARAM_LENGTH = 6000  # MLflow's limit
_LOCK_SECONDS = 30.0  # that a process waits for another one, which makes the tables of a database
_SETTINGS = {  # of MLflow's own, unless the user has some
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a connection to SQLite must not be used on both sides of a fork: none is kept open
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    # a call to a server that does not answer ends soon, as the uploader tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_USE = """\
Takes float images {} with pixels from 0 to 1, gives logits {}.

```
model = mlflow.pytorch.load_model("runs:/{}/model")
```
"""  # the description of a model


def store_uri(asked: str | None, root: Path) -> str:
    """MLFLOW_TRACKING_URI if set, else what was asked for, else SQLite under `root`."""
    return os.environ.get(ENVIRONMENT) or asked or f"{_SQLITE}{root / 'mlflow.db'}"


def check_store(
    uri: str, experiment: str | None = None, required: bool = True, option: str = ""
) -> None:
    """Raises ConfigError for a store that cannot be opened, as far as a look can tell.

    `experiment`: that runs are to be recorded in. `required`: a server has to answer now.
    `option`: that has named the store, if that is not tracking.uri or the environment.
    Takes no import of mlflow, and creates nothing.
    """
    if uri.startswith("sqlite:") and (not uri.removeprefix(_SQLITE) or "?" in uri or
                                      not uri.startswith(_SQLITE)):  # fmt: skip
        raise ConfigError(f"{_said(uri, option)}: must name a file, sqlite:////ABSOLUTE/PATH.db")
    if uri.startswith(_SQLITE):
        _check_sqlite(uri, Path(uri.removeprefix(_SQLITE)), experiment, option)
    elif uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=3).close()
        except urllib.error.HTTPError as answer:  # somebody is there: mlflow will find out who
            answer.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not required and isinstance(error, OSError):
                return
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"{_said(uri, option)}: no MLflow server answers there ({reason}). Start it, or "
                f"{_another_store(uri, option)}"
            ) from error
    elif not uri.startswith(_SERVED):
        raise ConfigError(
            f"{_said(uri, option)}: must be sqlite:////ABSOLUTE/PATH.db, the http(s) address of a "
            f"server, or one of {', '.join(_SERVED)}... (MLflow no longer keeps runs in plain "
            f"folders)"
        )
    elif required:
        Store(uri)


def _check_sqlite(uri: str, path: Path, experiment: str | None, option: str) -> None:
    def fail(reason: str) -> None:
        raise ConfigError(
            f"{_said(uri, option)}: cannot be opened, {reason}. To go on, "
            f"{_another_store(uri, option)}"
        )

    if not path.parent.is_dir():
        fail(f"there is no folder {path.parent}")
    try:  # SQLite needs its journal beside the database
        files.check_folder(path.parent)
    except OSError as error:
        fail(f"the folder {path.parent} cannot be written ({error.strerror})")
    if not path.exists():
        return
    if path.is_dir():
        fail("it is a folder")
    if not os.access(path, os.R_OK | os.W_OK):
        fail("the file cannot be read and written")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not tables:
                return
            if not {"alembic_version", "experiments"} <= tables:
                fail("it is a database of something else than MLflow")
            versions = [name for (name,) in database.execute("SELECT * FROM alembic_version")]
            if versions != [newest := _schema()]:
                fail(
                    f"its tables are of another version of MLflow ({', '.join(versions)}; this "
                    f"one's is {newest}). To convert it: mlflow db upgrade {uri}"
                )
            question = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = "
            deleted = database.execute(f"{question} 'deleted'", (experiment,)).fetchone()
    except sqlite3.DatabaseError as error:
        fail(str(error))
    if deleted:
        raise _deleted(uri, str(experiment), deleted[0])


@functools.cache
def _schema() -> str:
    """The version of the tables that the installed MLflow makes: of its migrations, the last one.

    Read from their files, which takes no import of mlflow.
    """
    found = importlib.util.find_spec("mlflow")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "store" / "db_migrations" / "versions"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    line = r"^{}\s*(?::[^=]+)?=\s*[\"'](\w+)[\"']"
    made = {m for text in texts for m in re.findall(line.format("revision"), text, re.M)}
    followed = {m for text in texts for m in re.findall(line.format("down_revision"), text, re.M)}
    (last,) = made - followed
    return str(last)


def _deleted(uri: str, experiment: str, number: object) -> ConfigError:
    return ConfigError(
        f"tracking.experiment={experiment}: it was deleted. Choose another name, or restore it: "
        f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {number}"
    )


def has_runs(uri: str) -> bool:
    """Whether the store may hold a run; a database that was never made does not."""
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


def listed(uri: str, sweep: bool | None) -> list[tuple[str, str]]:
    """The runs that `Store.find` chooses from, newest first: (id, name).

    Of a database that is a file, without mlflow, whose import takes longer than a person waits for
    a completion. Of another store, the newest page of them.
    """
    if not has_runs(uri):
        return []
    if not uri.startswith(_SQLITE):
        return [(run.id, run.name) for run in Store(uri).of_kind(sweep, newest=True)]
    path = Path(uri.removeprefix(_SQLITE)).resolve()
    question = """
        SELECT runs.run_uuid, runs.name FROM runs JOIN experiments USING (experiment_id)
        LEFT JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'sweep'
        WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'
        AND (:sweep IS NULL OR :sweep = (tags.value IS NOT NULL))
        ORDER BY runs.start_time DESC, runs.run_uuid"""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1)) as database:
        return list(database.execute(question, {"sweep": sweep}))


def say_store(asked: str | None) -> None:
    """Says where the environment decides, and not what was typed."""
    decided = os.environ.get(ENVIRONMENT)
    if asked is not None and decided and decided != asked:
        log.warning("%s=%s is used, and not tracking.uri=%s", ENVIRONMENT, decided, asked)


def _said(uri: str, option: str = "") -> str:
    """How the store was chosen, for messages: what would have to be changed."""
    if option:
        return f"{option} {uri}"
    return f"{ENVIRONMENT if os.environ.get(ENVIRONMENT) == uri else 'tracking.uri'}={uri}"


def _another_store(uri: str, option: str) -> str:
    """How to choose one, where this one will not do."""
    if option:
        return f"choose another store: {option} sqlite:////ABSOLUTE/PATH.db"
    if os.environ.get(ENVIRONMENT) == uri:
        return f"set {ENVIRONMENT} to another store, or unset it: it counts before tracking.uri"
    return "choose another store: tracking.uri=sqlite:////ABSOLUTE/PATH.db"


def _make_database(path: Path) -> None:
    """An SQLite database with MLflow's tables, unless it is there: whole, or not there at all.

    MLflow makes its tables in fifty steps, some seconds in all, and a process that ends between two
    of them would leave a database that no MLflow can open.
    """
    import mlflow

    if path.exists() and path.stat().st_size > 0:
        return
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part*"):  # a killed process left it
        left.unlink()
    # another name each time, as MLflow remembers in which databases it has made tables
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    mlflow.MlflowClient(f"{_SQLITE}{part}").search_experiments(max_results=1)
    part.replace(path)


@dataclass(frozen=True)
class StoredRun:
    """A run as a store has it."""

    store_uri: str
    id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    experiment_id: str
    start_time: int  # ms since 1970
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]  # the newest value of each
    dataset_digest: str  # the SHA-256 of the data that it was trained on, or ""

    @classmethod
    def from_entity(cls, store_uri: str, entity: Any) -> "StoredRun":
        """Return the run that an entity of MLflow describes."""
        inputs = entity.inputs.dataset_inputs if entity.inputs else []
        digests = [tag.value for data in inputs for tag in data.tags if tag.key == "sha256"]
        info, data = entity.info, entity.data
        return cls(
            store_uri=store_uri,
            id=info.run_id,
            name=info.run_name,
            status=info.status,
            experiment_id=info.experiment_id,
            start_time=info.start_time,
            tags=data.tags,
            params=data.params,
            metrics=data.metrics,
            dataset_digest=digests[0] if digests else "",
        )

    @property
    def parent(self) -> str:
        """The id of the sweep's run that this one belongs to, or ""."""
        return self.tags.get(PARENT, "")

    @property
    def job(self) -> int | None:
        """The number of the sweep's job that this run is; None for any other run."""
        number = self.tags.get("job", "")
        return int(number) if number.isdecimal() else None

    def parsed_tag(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Return the parsed value of a tag, or `default` where the run does not have it.

        Raises:
            ConfigError: `parse` raised ValueError or TypeError.
        """
        text = self.tags.get(name)
        if text is None:
            return default
        try:
            return parse(text)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run {self.id}: its tag {name} is damaged, {text[:60]!r}") from error

    def choices(self) -> dict[str, str | None]:
        """Return the option of each config group that the run was made of, or raise ConfigError."""
        return self.parsed_tag("choices", lambda text: dict(json.loads(text)), {})

    def explain_status(self) -> str:
        """Return the run's status, the reason for it, and what a person can do next."""
        text = f"the run is {self.status}"
        if reason := self.tags.get("reason"):
            text += f": {reason}"
        if self.status == "RUNNING":
            text += f". Its record grows in {self.tags.get('output_dir', '?')}: wait for its end"
        elif self.status == "KILLED":
            words = [
                "mnist-exp",
                "resume",
                self.parent or self.id,
                f"tracking.uri={self.store_uri}",
            ]
            text += f". To go on with it: {shlex.join(words)}"
        return text


class Store:
    """An MLflow store, opened. Raises ConfigError where it cannot be."""

    def __init__(self, uri: str) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow

        for name in ("mlflow", "alembic"):  # its import sets them up
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        self._experiments: dict[str, str] = {}  # name -> id
        asked = os.environ.get(ENVIRONMENT)
        mlflow.set_tracking_uri(uri)
        # which also sets the variable, and store_uri() would take this store for the next run's
        if asked is None:
            os.environ.pop(ENVIRONMENT, None)
        else:
            os.environ[ENVIRONMENT] = asked
        try:
            with self.lock():
                if uri.startswith(_SQLITE):
                    _make_database(Path(uri.removeprefix(_SQLITE)))
                self.client = mlflow.MlflowClient(uri)
                self.client.search_experiments(max_results=1)
        except Exception as error:  # whatever the driver of this kind of store raises
            raise ConfigError(f"{_said(uri)}: cannot be opened, {first_line(error)}") from error

    def lock(self) -> AbstractContextManager[object]:
        """One process at a time, where MLflow does not see to it in a database that is a file."""
        if not self.uri.startswith(_SQLITE):
            return nullcontext()
        return FileLock(self.uri.removeprefix(_SQLITE) + ".lock", timeout=_LOCK_SECONDS)

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, made if it is not there."""
        from mlflow.exceptions import MlflowException

        if name in self._experiments:
            return self._experiments[name]
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = None  # a server keeps artifacts where it was told to
            if self.uri.startswith(_SQLITE):
                folder = Path(self.uri.removeprefix(_SQLITE)).resolve().parent / "mlruns"
                location = folder.as_uri()
            try:
                tags = {"mlflow.experimentKind": "custom_model_development", view.TAG: view.tag()}
                made = self.client.create_experiment(name, location, tags)
                self._experiments[name] = str(made)
                return self._experiments[name]
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise _deleted(self.uri, name, found.experiment_id)
        if view.TAG not in found.tags:
            self.client.set_experiment_tag(found.experiment_id, view.TAG, view.tag())
        self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def forget(self) -> None:
        """What is known of the experiments."""
        self._experiments.clear()

    def _search(self, condition: str = "", newest: bool = False) -> list[StoredRun]:
        """Return the runs of all experiments, newest first; `newest`: a page of them will do."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        token, runs = None, []
        while True:
            page = self.client.search_runs(
                experiments, condition, order_by=["attributes.start_time DESC"], page_token=token
            )
            runs += [StoredRun.from_entity(self.uri, entity) for entity in page]
            token = page.token
            if newest or not token:
                return runs

    def get(self, run_id: str) -> StoredRun:
        """Return the run of this id."""
        return StoredRun.from_entity(self.uri, self.client.get_run(run_id))

    def put(self, run_id: str, path: Path) -> None:
        """A file, among a run's artifacts."""
        self.client.log_artifact(run_id, str(path))

    def children(self, parent: str) -> dict[int, StoredRun]:
        """Return the runs of a sweep by the number of their job, in its order."""
        runs = self._search(f"tags.`{PARENT}` = '{parent}'")
        # what somebody else has nested has no number
        jobs = {run.job: run for run in runs if run.job is not None}
        return dict(sorted(jobs.items()))

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """The points of a metric: (step, value)."""
        return [(m.step, m.value) for m in self.client.get_metric_history(run_id, key)]

    def of_kind(self, sweep: bool | None, newest: bool = False) -> list[StoredRun]:
        """The runs, newest first; sweep: whether they are the parent runs of sweeps, None: either.
        `newest`: a page of them will do."""
        runs = self._search("tags.sweep = 'true'" if sweep else "", newest)
        return [run for run in runs if sweep is not False or "sweep" not in run.tags]

    def find(self, word: str, sweep: bool | None = False) -> StoredRun:
        """The run that a person means: `last`, a run id, or the beginning of just one.

        sweep: whether it is to be the parent run of a sweep, or one that trains; None: either, and
        the last one is then no job of a sweep.
        """
        kind = "sweep" if sweep else "run"
        if not isinstance(word, str):
            raise ConfigError(f"{kind}: must be a text, as in 'last' or an id, and is {word!r}")
        runs = self.of_kind(sweep, newest=word == "last")
        if sweep is None and word == "last":
            runs = [run for run in runs if not run.parent]
        if not runs:
            words = "train -m optimizer.lr=0.01,0.1" if sweep else "train"
            raise ConfigError(
                f"{self.uri}: it holds no {kind}s yet. To make one: mnist-exp {words}"
            )
        matching = [run for run in runs if run.id.startswith(word)]
        if word == "last":
            matching = runs[:1]
        if word and not matching:
            self._refuse_other_kind(word, sweep)
        if not word or not matching:
            newest = ", ".join(run.id[:8] for run in runs[:5])
            raise ConfigError(
                f"{word or repr(word)}: there is no such {kind} in {self.uri}. {kind.upper()} is "
                f"last, a run id or its beginning; the newest: {newest}"
            )
        if len(matching) > 1:
            ids = ", ".join(run.id[:12] for run in matching[:5])
            raise ConfigError(f"{word}: {len(matching)} {kind}s begin like this: {ids}")
        return matching[0]

    def _refuse_other_kind(self, word: str, sweep: bool | None) -> None:
        """Raises ConfigError where a sweep is meant and it is a run, or the other way round."""
        others = [run for run in self._search() if run.id.startswith(word)]
        if len(others) != 1 or sweep is None:
            return
        parent = others[0].parent
        if not sweep:
            children = [run.id[:8] for run in self.children(others[0].id).values()]
            what = f"it is a sweep, not a run. Its runs: {', '.join(children[:5])}. "
            what += f"Its seeds together: mnist-exp evaluate {word} --ensemble"
        elif parent:
            what = f"it is a run of the sweep {parent[:8]}"
        else:
            what = "it is a run, not a sweep. Alone, it is evaluated without --ensemble"
        raise ConfigError(f"{word}: {what}")

    def page(self, word: str | None) -> str:
        """Of the UI: a run's, as for `find`; None: the list of the newest run's experiment."""
        if word is not None:
            run = self.find(word, sweep=None)
            return view.run_page(run.experiment_id, run.id)
        if not (runs := self._search(newest=True)):
            return ""
        experiment = self.client.get_experiment(runs[0].experiment_id)
        return view.list_page(experiment.experiment_id, saved=view.TAG in experiment.tags)

    def has(self, run_id: str, artifact: str) -> bool:
        """Whether a run has an artifact of this name, at the top."""
        return artifact in (file.path for file in self.client.list_artifacts(run_id))

    def fetch(self, run_id: str, artifact: str, folder: Path) -> Path:
        """A copy of a run's artifact. Raises ConfigError if the run has none of this name."""
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run_id, artifact, str(folder)))
        except (MlflowException, OSError) as error:
            why = f"its artifact {artifact} cannot be fetched, {first_line(error)}"
            with contextlib.suppress(MlflowException, OSError):
                if not self.has(run_id, artifact):
                    why = f"it has no artifact {artifact}"
            raise ConfigError(f"run {run_id}: {why}") from error


def save_model(
    folder: Path,
    model: "torch.nn.Module",
    shape: Sequence[int],
    classes: int,
    example: "np.ndarray",
) -> None:
    """The model as MLflow keeps it, with signature and example. example: float32 [B, C, H, W], B
    at least 2.

    As an exported program, which loads where this package is not; a module that cannot be
    exported (its control flow depends on values) is pickled instead.
    """
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    real = np.dtype("float32")
    signature = ModelSignature(
        Schema([TensorSpec(real, (-1, *shape))]), Schema([TensorSpec(real, (-1, classes))])
    )
    # said outright, as MLflow would load the model in another process to find out
    requirements = [f"{name}=={version(name)}" for name in ("torch", "mlflow")]
    for form in ("pt2", "pickle"):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it saved
        try:
            mlflow.pytorch.save_model(
                model,
                str(folder),
                signature=signature,
                input_example=example,
                pip_requirements=requirements,
                serialization_format=form,
            )
        except Exception as error:  # torch.export raises whatever it meets
            if form == "pickle":
                raise
            log.warning("the model is pickled, as it cannot be exported: %s", first_line(error))
        else:
            return


@dataclass(frozen=True)
class UploadState:
    """How far a journal has come to MLflow."""

    uri: str
    run_id: str = ""
    offset: int = 0  # bytes of the journal
    creating: bool = False  # the run was being made: it may be there, if the answer was lost
    ended: bool = False  # what has been delivered comes to the run's end

    @classmethod
    def of(cls, folder: Path, uri: str = "") -> "UploadState":
        """To the store `uri`, if that is said."""
        try:
            told = cls(**json.loads((folder / _DELIVERED).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return cls(uri)
        except (ValueError, TypeError):  # after a power cut
            return cls(uri, creating=True)
        return told if uri in ("", told.uri) else cls(uri, creating=True)

    def save(self, folder: Path) -> "UploadState":
        part = folder / f"{_DELIVERED}.part"
        part.write_text(json.dumps(asdict(self)))
        os.replace(part, folder / _DELIVERED)
        return self


def deliver(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
    """Copies what is new in a run's journal to MLflow, with the times it was written at.

    What has been delivered already is the same when it is delivered again. Raises whatever MLflow
    raises; what it has taken until then is remembered.
    """
    from mlflow.exceptions import MlflowException

    with FileLock(folder / ".delivery.lock"):
        told = UploadState.of(folder, store.uri)
        try:
            told = _send(folder, store, told)
        except MlflowException as error:
            if not told.run_id:
                raise
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the store has been made anew since
                store.forget()
                told = _send(folder, store, UploadState(store.uri, creating=True).save(folder))
            elif store.client.get_run(told.run_id).info.lifecycle_stage == "deleted":
                log.warning("%s: its run was deleted in MLflow, and gets no more", folder)
                end, ended = journal.size(folder), bool(RunHistory.of(folder).status)
                told = replace(told, offset=end, ended=ended).save(folder)
            else:
                raise
        with journal.lock(folder):
            if told.ended and told.offset >= journal.size(folder):
                open_runs.remove(RunHistory.of(folder).key)
    return told


def _send(folder: Path, store: Store, told: UploadState) -> UploadState:
    end = journal.size(folder)
    entries, problems = journal.read(folder, told.offset)
    for problem in problems:
        log.warning("%s", problem)
    batch = UploadBatch(store, folder, told)
    for entry in entries:
        batch.add(entry)
    batch.end = max(batch.end, end)  # a damaged line may be the last one
    return batch.send()


class UploadBatch:
    """Entries of a journal on their way to MLflow, many to a call."""

    def __init__(self, store: Store, folder: Path, told: UploadState) -> None:
        self.store, self.client, self.folder, self.told = store, store.client, folder, told
        self.metrics: list[Any] = []
        self.params: list[Any] = []
        self.tags: dict[str, str] = {}
        self.end = told.offset  # behind the last entry that was added
        self.ended = told.ended

    def add(self, entry: Entry) -> None:
        from mlflow.entities import Metric, Param

        fields = entry.fields
        if entry.kind == "begin":
            self._begin(entry)
        elif entry.kind == "params":
            self.params += [Param(k, v[:_PARAM_LENGTH]) for k, v in fields["values"].items()]
        elif entry.kind == "tags":
            self.tags |= {key: str(value) for key, value in fields["values"].items()}
        elif entry.kind == "metrics":
            self.metrics += [
                Metric(key, value, entry.time, fields["step"])
                for key, value in fields["values"].items()
            ]
        else:
            self.send()
            self._call(entry)
        if entry.kind in ("begin", "resume", "end"):
            self.ended = entry.kind == "end"
        self.end = entry.end

    def send(self) -> UploadState:
        """Sends what waits, and remembers how far the journal has been delivered."""
        from mlflow.entities import RunTag

        run_id = self.told.run_id
        if not run_id and self.end > self.told.offset:
            raise NotReady(f"{self.folder / journal.NAME}: its first line is missing or damaged")
        tags = [RunTag(key, value) for key, value in self.tags.items()]
        while self.metrics or self.params or tags:
            params, some = self.params[:_PARAMS_A_BATCH], tags[:_PARAMS_A_BATCH]
            metrics = self.metrics[: _METRICS_A_BATCH - len(params) - len(some)]
            self.client.log_batch(run_id, metrics, params, some)
            del self.metrics[: len(metrics)], self.params[: len(params)], tags[: len(some)]
        self.tags = {}
        if self.end > self.told.offset:
            told = replace(self.told, offset=self.end, ended=self.ended)
            self.told = told.save(self.folder)
        return self.told

    def _begin(self, entry: Entry) -> None:
        if self.told.run_id:
            return
        fields, tags = entry.fields, dict(entry.fields["tags"])
        if fields["parent"]:
            parent = UploadState.of(Path(fields["parent"]), self.store.uri)
            if not parent.run_id:
                raise NotReady(f"the sweep of {self.folder} is not in MLflow yet")
            tags[PARENT] = parent.run_id
        experiment = self.store.experiment(fields["experiment"])
        run_id = ""
        if self.told.creating:
            runs = self.client.search_runs([experiment], f"tags.{RUN_KEY} = '{fields['key']}'")
            run_id = runs[0].info.run_id if runs else ""
        else:
            self.told = replace(self.told, creating=True).save(self.folder)
        if not run_id:
            run = self.client.create_run(
                experiment, entry.time, {**tags, RUN_KEY: fields["key"]}, fields["name"]
            )
            run_id = run.info.run_id
        self.told = replace(self.told, run_id=run_id, creating=False).save(self.folder)

    def _call(self, entry: Entry) -> None:
        """What has a call of its own."""
        run_id, fields = self.told.run_id, entry.fields
        if entry.kind == "artifact":
            path = self.folder / fields["path"]
            if path.exists():  # a checkpoint may be gone, after a later one has come
                self.client.log_artifact(run_id, str(path), fields["to"] or None)
        elif entry.kind == "dataset":
            self._dataset(fields)
        elif entry.kind == "model":
            self._model(self.folder / fields["path"])
        elif entry.kind == "resume":
            self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, "reason", "")
        elif entry.kind == "end":
            if fields["reason"]:
                self.client.set_tag(run_id, "reason", fields["reason"])
            self.client.set_terminated(run_id, fields["status"], entry.time)

    def _dataset(self, fields: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=fields["name"],
            digest=fields["digest"][:8],  # as short as MLflow's own, which its UI has room for
            source_type="local",
            source=json.dumps({"uri": fields["source"]}),
            profile=json.dumps({"image": fields["shape"], **fields["sizes"]}),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("sha256", fields["digest"])]
        with self.store.lock():  # of two that record one dataset for the first time, one would fail
            self.client.log_inputs(self.told.run_id, [DatasetInput(entity, tags)])

    def _model(self, saved: Path) -> None:
        """As `mlflow.pytorch.log_model` does, from what it would have saved; needs no torch."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        run = self.client.get_run(self.told.run_id)
        run_id, experiment = run.info.run_id, run.info.experiment_id
        found = self.client.search_logged_models(
            [experiment], filter_string=f"source_run_id = '{run_id}' AND name = 'model'"
        )
        model = found[0] if found else None
        if model is None:
            known = ("mlflow.user", "mlflow.source.")  # and not those of who delivers it
            tags = {key: v for key, v in run.data.tags.items() if key.startswith(known)}
            signature = Model.load(saved).signature
            schemas = (signature.inputs, signature.outputs)
            shapes = [list(schema.inputs[0].shape) for schema in schemas]
            tags["mlflow.note.content"] = _USE.format(*shapes, run_id)
            model = self.client.create_logged_model(
                experiment, "model", run_id, tags, run.data.params
            )
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in [output.model_id for output in outputs]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        if model.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(saved, folder, dirs_exist_ok=True)
                description = Model.load(folder)
                description.artifact_path = model.artifact_location
                description.run_id = run_id
                description.model_id = description.model_uuid = model.model_id
                description.save(f"{folder}/MLmodel")
                self.client.log_model_artifacts(model.model_id, folder)
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


class NotReady(Exception):
    """A record cannot be delivered, and the server is not to blame."""
