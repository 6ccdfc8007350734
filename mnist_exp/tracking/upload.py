"""The way of journals to MLflow, which an uploader or `sync` takes."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_exp.errors import ConfigError, first_line
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import Entry, RunHistory
from mnist_exp.tracking.limits import PARAM_LENGTH, RUN_NAME_LENGTH, TAG_LENGTH, storable
from mnist_exp.tracking.mlflow_internals import PARENT
from mnist_exp.tracking.mlflow_model import log_model
from mnist_exp.tracking.outages import may_pass
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import RUN_KEY

log = logging.getLogger(__name__)

MOST_FAILURES = 2  # that may pass, in a row: it is not the run, it is the server

DELIVERY_LOCK = ".delivery.lock"  # a file in the folder of a run that is being uploaded
_STATE = ".delivery.json"
_METRICS_A_BATCH = 1000  # MLflow's limit, for all that is in a call
_PARAMS_A_BATCH = 100  # MLflow's limit, for tags as well


class NotReady(Exception):
    """A journal cannot be uploaded now, and the server is not to blame."""


@dataclass(frozen=True)
class Problem:
    """The reason why a store does not have a record."""

    reason: str
    may_pass: bool  # by itself, as where a server is down


@dataclass(frozen=True)
class UploadState:
    """A mark of how much of a journal a store has."""

    uri: str  # of the store
    run_id: str = ""
    offset: int = 0  # bytes of the journal
    creating: bool = False  # the run was being made: it may be there, if the answer was lost
    ended: bool = False  # what has been uploaded comes to the run's end

    @classmethod
    def of(cls, folder: Path, uri: str = "") -> "UploadState":
        """Return the state of a run's folder; with a `uri`, a new one if it is of another store."""
        try:
            state = cls(**json.loads((folder / _STATE).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return cls(uri)
        except (ValueError, TypeError):  # after a power cut
            return cls(uri, creating=True)
        return state if uri in ("", state.uri) else cls(uri, creating=True)

    def save(self, folder: Path) -> "UploadState":
        """Write the state into a run's folder, and return it."""
        files.write(folder / _STATE, json.dumps(asdict(self)))
        return self


def upload_journal(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
    """Copy what is new in a run's journal to MLflow, with the times it was written at.

    What was uploaded before stays the same when it is uploaded again. Raises whatever MLflow
    raises; the state says what it has taken until then.
    """
    from mlflow.exceptions import MlflowException

    _check_there(folder)  # as the lock would make the folder anew
    with FileLock(folder / DELIVERY_LOCK):
        _check_there(folder)
        state = UploadState.of(folder, store.uri)
        try:
            state = _upload_entries(folder, store, state)
        except MlflowException as error:
            if not state.run_id:
                raise
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the store has been made anew since
                store.forget()
                state = UploadState(store.uri, creating=True).save(folder)
                state = _upload_entries(folder, store, state)
            elif store.client.get_run(state.run_id).info.lifecycle_stage == "deleted":
                log.warning("%s: its run was deleted in MLflow, and gets no more", folder)
                end, ended = journal.size(folder), bool(RunHistory.of(folder).status)
                state = replace(state, offset=end, ended=ended).save(folder)
            else:
                raise
        _check_there(folder)
        with journal.lock(folder):
            key = RunHistory.of(folder).key
            if key and state.ended and state.offset >= journal.size(folder):
                open_runs.remove(key)
    return state


def _check_there(folder: Path) -> None:
    """Raise NotReady if the folder of a run was removed, which may be in this moment."""
    if not (folder / journal.NAME).exists():
        raise NotReady(f"{folder}: it holds no {journal.NAME} any more")


def _upload_entries(folder: Path, store: Store, state: UploadState) -> UploadState:
    """Send the entries behind `state` to MLflow, and return how far it has come."""
    end = journal.size(folder)
    entries, problems = journal.read(folder, state.offset)
    for problem in problems:
        log.warning("%s", problem)
    batch = UploadBatch(store, folder, state)
    for entry in entries:
        batch.add(entry)
    batch.end = max(batch.end, end)  # a damaged line may be the last one
    return batch.send()


class UploadBatch:
    """Entries of a journal that are on their way to MLflow, many in a call."""

    def __init__(self, store: Store, folder: Path, state: UploadState) -> None:
        self.store, self.client, self.folder, self.state = store, store.client, folder, state
        self.metrics: list[Any] = []
        self.params: list[Any] = []
        self.tags: dict[str, str] = {}
        self.end = state.offset  # behind the last entry that was added
        self.ended = state.ended

    def add(self, entry: Entry) -> None:
        """Add an entry, and send it at once where it has a call of its own."""
        from mlflow.entities import Metric, Param

        fields = entry.fields
        if entry.kind == "begin":
            self._create_run(entry)
        elif entry.kind == "params":
            self.params += [
                Param(key, storable(value, PARAM_LENGTH)) for key, value in fields["values"].items()
            ]
        elif entry.kind == "tags":
            self.tags |= _storable_tags(fields["values"])
        elif entry.kind == "metrics":
            self.metrics += [
                Metric(key, value, entry.time, fields["step"])
                for key, value in fields["values"].items()
            ]
        else:
            self.send()
            self._send_alone(entry)
        if entry.kind in ("begin", "resume", "end"):
            self.ended = entry.kind == "end"
        self.end = entry.end

    def send(self) -> UploadState:
        """Send what waits, and save and return the state that this comes to."""
        from mlflow.entities import RunTag

        run_id = self.state.run_id
        if not run_id and self.end > self.state.offset:
            raise NotReady(f"{self.folder / journal.NAME}: its first line is missing or damaged")
        tags = [RunTag(key, value) for key, value in self.tags.items()]
        while self.metrics or self.params or tags:
            params, some = self.params[:_PARAMS_A_BATCH], tags[:_PARAMS_A_BATCH]
            metrics = self.metrics[: _METRICS_A_BATCH - len(params) - len(some)]
            self.client.log_batch(run_id, metrics, params, some)
            del self.metrics[: len(metrics)], self.params[: len(params)], tags[: len(some)]
        self.tags = {}
        if self.end > self.state.offset:
            state = replace(self.state, offset=self.end, ended=self.ended)
            self.state = state.save(self.folder)
        return self.state

    def _create_run(self, entry: Entry) -> None:
        """Create the run in MLflow, or find it where an earlier try has created it."""
        if self.state.run_id:
            return
        fields, tags = entry.fields, _storable_tags(entry.fields["tags"])
        if fields["parent"]:
            parent = UploadState.of(Path(fields["parent"]), self.store.uri)
            if not parent.run_id:
                raise NotReady(f"the sweep of {self.folder} is not in MLflow yet")
            tags[PARENT] = parent.run_id
        experiment = self.store.experiment(fields["experiment"])
        run_id = ""
        if self.state.creating:
            runs = self.client.search_runs([experiment], f"tags.{RUN_KEY} = '{fields['key']}'")
            run_id = runs[0].info.run_id if runs else ""
        else:
            self.state = replace(self.state, creating=True).save(self.folder)
        if not run_id:
            run = self.client.create_run(
                experiment,
                entry.time,
                {**tags, RUN_KEY: fields["key"]},
                storable(fields["name"], RUN_NAME_LENGTH),
            )
            run_id = run.info.run_id
        self.state = replace(self.state, run_id=run_id, creating=False).save(self.folder)

    def _send_alone(self, entry: Entry) -> None:
        """Send an entry that has a call of its own."""
        run_id, fields = self.state.run_id, entry.fields
        if entry.kind == "artifact":
            path = self.folder / fields["path"]
            if path.exists():  # a checkpoint may be gone, after a later one has come
                self.client.log_artifact(run_id, str(path), fields["to"] or None)
        elif entry.kind == "dataset":
            self._send_dataset(fields)
        elif entry.kind == "model":
            path = self.folder / fields["path"]
            if path.exists():
                log_model(self.client, run_id, path)
            else:
                log.warning("%s: it is gone, and MLflow gets the run without it", path)
        elif entry.kind == "resume":
            self.client.update_run(run_id, status="RUNNING")
            self.client.set_tag(run_id, "reason", "")
        elif entry.kind == "end":
            if fields["reason"]:
                self.client.set_tag(run_id, "reason", storable(fields["reason"], TAG_LENGTH))
            self.client.set_terminated(run_id, fields["status"], entry.time)

    def _send_dataset(self, fields: Mapping[str, Any]) -> None:
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
            self.client.log_inputs(self.state.run_id, [DatasetInput(entity, tags)])


def _storable_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: storable(value, TAG_LENGTH) for key, value in tags.items()}


def upload_all(
    waiting: Sequence[tuple[str, Path]],
    open_runs: OpenRuns,
    stores: dict[str, Store],
    *,
    tries_again: bool,
) -> dict[Path, Problem]:
    """Upload journals, each to its store, and return why not for the folders that failed.

    Args:
        waiting: The store and the folder of each.
        open_runs: A run leaves it once its store has all of it.
        stores: Those that are open; one that is opened is added.
        tries_again: Look at a store anew after failures in a row, and go on. Otherwise the rest
            of its journals wait for the next call.
    """
    problems: dict[Path, Problem] = {}
    closed: dict[str, Problem] = {}  # stores that cannot be opened
    failures: Counter[str] = Counter()  # of a store, in a row
    for uri, folder in waiting:
        if uri in closed:
            problems[folder] = closed[uri]
            continue
        # first, and after failures in a row: is it those runs, or the store?
        if uri not in stores or failures[uri] >= MOST_FAILURES:
            try:
                check_store(uri)  # where nobody answers, MLflow need not be imported
                stores[uri] = Store(uri)
            except ConfigError as error:
                problems[folder] = closed[uri] = Problem(first_line(error), may_pass(error))
                continue
            failures[uri] = 0
        try:
            upload_journal(folder, open_runs, stores[uri])
            failures[uri] = 0
        except NotReady as error:
            problems[folder] = Problem(str(error), may_pass=True)
        except Exception as error:  # whatever a network, a server or a database can raise
            log.debug("not uploaded: %s", folder, exc_info=error)
            problems[folder] = Problem(first_line(error), may_pass(error))
            if not problems[folder].may_pass:  # it is this run alone that is refused
                continue
            failures[uri] += 1
            if failures[uri] == MOST_FAILURES and not tries_again:
                closed[uri] = problems[folder]
    return problems


def has_news(folder: Path, uri: str) -> bool:
    """Return whether a journal holds what the store `uri` does not have."""
    return journal.size(folder) > UploadState.of(folder, uri).offset
