"""An MLflow store that is open, and the runs that it holds."""

import functools
import itertools
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from mnist_exp.errors import ConfigError, first_line
from mnist_exp.tracking import kept_files, mlflow_internals, ui_view
from mnist_exp.tracking.address import (
    ENVIRONMENT,
    artifact_root,
    database_file,
    deleted_experiment,
    named,
)
from mnist_exp.tracking.journal import EPOCH_METRIC
from mnist_exp.tracking.mlflow_internals import PARENT, Point
from mnist_exp.tracking.stored_run import StoredRun, sizes_of

log = logging.getLogger(__name__)
T = TypeVar("T")

_PAGE = 1000  # the newest runs, which are searched for the last one
_PART = 250  # runs that a call returns where all are wanted: a busy server takes seconds for more
_LOCK_SECONDS = 30.0  # that a process waits for another one, which makes the tables of a database


def has_runs(uri: str) -> bool:
    """Return whether the store may hold a run; a database that was never made does not."""
    path = database_file(uri)
    return path is None or path.exists()


def list_runs(uri: str, sweep: bool | None) -> list[tuple[str, str]]:
    """Return id and name of the runs that `Store.find` chooses from."""
    if not has_runs(uri):
        return []
    return [(run.id, run.name) for run in Store(uri).of_kind(sweep, newest=True)]


class Store:
    """An MLflow store that is open.

    What an SQLite database holds is read from its tables: that takes milliseconds, and MLflow's
    import seconds. MLflow does the rest, and all with other stores.
    """

    def __init__(self, uri: str) -> None:
        """Open a store; an SQLite database that is not there is made. Raises ConfigError."""
        self.uri, self.database = uri, database_file(uri)
        self._experiments: dict[str, str] = {}  # name -> id
        if self.database is None or not self.database.exists():
            self.client  # noqa: B018  an error is raised here

    @functools.cached_property
    def client(self) -> Any:
        """MLflow's client of the store. Raises ConfigError."""
        mlflow = mlflow_internals.import_mlflow()
        before = os.environ.get(ENVIRONMENT)
        mlflow.set_tracking_uri(self.uri)
        # which also sets the variable, and store_uri() would take this store for the next run's
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before
        try:
            with self.lock():
                if self.database is not None:
                    mlflow_internals.make_database(self.database)
                client = mlflow.MlflowClient(self.uri)
                client.search_experiments(max_results=1)
        except Exception as error:  # whatever the driver of this kind of store raises
            raise ConfigError(
                f"{named(self.uri)}: cannot be opened, {first_line(error)}"
            ) from error
        return client

    def lock(self) -> AbstractContextManager[object]:
        """Return a lock of one process, where MLflow has none: in a database that is a file."""
        if self.database is None:
            return nullcontext()
        return FileLock(f"{self.database}.lock", timeout=_LOCK_SECONDS)

    def experiment(self, name: str) -> str:
        """Return the id of the experiment of this name, which is made if it is not there.

        Raises ConfigError where it was deleted.
        """
        if name not in self._experiments:
            self._experiments[name] = self._find_or_create_experiment(name)
        return self._experiments[name]

    def _find_or_create_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None  # a server keeps artifacts where it was told to
            if self.database is not None:
                location = artifact_root(self.database)
            tags = {"mlflow.experimentKind": "custom_model_development", ui_view.TAG: ui_view.tag()}
            try:
                return str(self.client.create_experiment(name, location, tags))
            except MlflowException:
                experiment = self.client.get_experiment_by_name(name)  # another process was faster
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise deleted_experiment(self.uri, name, experiment.experiment_id)
        if ui_view.TAG not in experiment.tags:
            self.client.set_experiment_tag(experiment.experiment_id, ui_view.TAG, ui_view.tag())
        return str(experiment.experiment_id)

    def forget(self) -> None:
        """Forget what is known of the experiments, as where the store was made anew."""
        self._experiments.clear()

    def _search(
        self,
        tag: tuple[str, str] | None = None,
        newest: bool = False,
        view: str = "active_only",
    ) -> list[StoredRun]:
        """Return the runs of all experiments, newest first.

        Args:
            tag: The name and the value of a tag that they must have.
            newest: Whether a page of them will do.
            view: MLflow's word: all, or those that are marked as deleted (deleted_only), or others.
        """
        if self.database is not None:
            return self._read_runs(tag=tag, newest=_PAGE if newest else -1, view=view)
        client = self.client
        from mlflow.entities import ViewType

        kind = ViewType.from_string(view)
        experiments = self._all_experiments(kind if view == "active_only" else ViewType.ALL)
        pages = self._pages(
            "runs",
            client.search_runs,
            experiment_ids=[experiment.experiment_id for experiment in experiments],
            filter_string="" if tag is None else f"tags.`{tag[0]}` = '{tag[1]}'",
            run_view_type=kind,
            max_results=_PAGE if newest else _PART,
            order_by=["attributes.start_time DESC"],
        )
        read = itertools.islice(pages, 1 if newest else None)
        return [StoredRun.from_entity(self.uri, entity) for page in read for entity in page]

    def _all_experiments(self, kind: Any) -> list[Any]:
        """Return MLflow's entities of all experiments. `kind`: a ViewType. Raise ConfigError."""
        pages = self._pages("experiments", self.client.search_experiments, view_type=kind)
        return [experiment for page in pages for experiment in page]

    def _pages(self, what: str, read: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
        """Yield the pages that a function of MLflow returns. Raise ConfigError if it cannot."""
        token = None
        while True:
            try:
                page = read(**arguments, page_token=token)
            except Exception as error:  # whatever a network or a database raises
                raise ConfigError(
                    f"{named(self.uri)}: its {what} cannot be read, {first_line(error)}"
                ) from error
            yield page
            token = page.token
            if not token:
                return

    def made_at(self) -> int | None:
        """Return when a server was made, in ms since 1970; None where it does not tell.

        That is when the first of its experiments was made. Raises ConfigError.
        """
        from mlflow.entities import ViewType

        times = [experiment.creation_time for experiment in self._all_experiments(ViewType.ALL)]
        return min((time for time in times if time), default=None)

    def _read_runs(self, **conditions: Any) -> list[StoredRun]:
        """Return the runs that an SQLite database has under these conditions. Raise ConfigError."""
        rows = self.read_database(mlflow_internals.read_runs, **conditions)
        return [
            StoredRun(
                self.uri,
                dataset_digest=row.pop("digest"),
                dataset_sizes=sizes_of(row.pop("profile")),
                epochs=row.pop("steps").get(EPOCH_METRIC, 0),
                **row,
            )
            for row in rows
        ]

    def read_database(self, read: Callable[..., T], *args: Any, **options: Any) -> T:
        """Return what a function reads from the SQLite database. Raise ConfigError.

        A database that was made in this moment may have no tables yet.
        """
        try:
            return read(self.database, *args, **options)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{named(self.uri)}: cannot be read, {error}") from error

    def get(self, run_id: str) -> StoredRun:
        """Return the run of this id. Raise ConfigError if there is none in an SQLite database."""
        if self.database is None:
            return StoredRun.from_entity(self.uri, self.client.get_run(run_id))
        runs = self._read_runs(run_id=run_id)
        if not runs:
            raise ConfigError(f"{run_id}: there is no such run in {self.uri}")
        return runs[0]

    def put(self, run_id: str, path: Path) -> None:
        """Put a file among the artifacts of a run. Raises ConfigError in an SQLite database."""
        if (artifacts := self._local_artifacts(run_id)) is None:
            self.client.log_artifact(run_id, str(path))
        else:
            try:
                root = artifacts.parent.parent
                for place in (root, artifacts.parent, artifacts):  # not above: it may have moved
                    place.mkdir(exist_ok=True)
                shutil.copy2(path, artifacts)
            except OSError as error:
                raise ConfigError(
                    f"run {run_id}: {path.name} cannot be put among its artifacts in {artifacts} "
                    f"({error.strerror})"
                ) from error

    def _local_artifacts(self, run_id: str) -> Path | None:
        """Return the folder of the artifacts of a run in an SQLite database, if it is a folder."""
        return None if self.database is None else self.get(run_id).artifacts

    def children(self, parent: str) -> dict[int, StoredRun]:
        """Return the runs of a sweep by the number of their job, in its order."""
        runs = self._search((PARENT, parent))
        # what somebody else has nested has no number
        jobs = {run.job: run for run in runs if run.job is not None}
        return dict(sorted(jobs.items()))

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """Return the points of a metric: (step, value)."""
        if self.database is not None:
            return self.read_database(mlflow_internals.read_history, run_id, key)
        return [(m.step, m.value) for m in self.client.get_metric_history(run_id, key)]

    def points(self, runs: Iterable[StoredRun]) -> list[Point]:
        """Return all points of all metrics of some runs, in no order. Raise ConfigError.

        A server is asked once for each metric of each run.
        """
        if self.database is not None:
            return self.read_database(mlflow_internals.read_points, [run.id for run in runs])
        try:
            return [
                Point(run.id, key, metric.step, metric.timestamp, metric.value)
                for run in runs
                for key in run.metrics
                for metric in self.client.get_metric_history(run.id, key)
            ]
        except Exception as error:  # whatever a network raises
            raise ConfigError(
                f"{named(self.uri)}: the points of the metrics cannot be read, {first_line(error)}"
            ) from error

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run. Raise ConfigError where the store refuses one."""
        try:
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
        except Exception as error:  # whatever a network or a database raises
            raise ConfigError(
                f"{named(self.uri)}: run {run_id} does not get its tags, {first_line(error)}"
            ) from error

    def with_tag(self, name: str, value: str) -> list[StoredRun]:
        """Return the runs that have a tag of this value, those marked as deleted included."""
        return self._search((name, value), view="all")

    def everything(self) -> list[StoredRun]:
        """Return all runs, those marked as deleted included."""
        return self._search(view="all")

    def deleted(self) -> list[StoredRun]:
        """Return the runs that are marked as deleted."""
        return self._search(view="deleted_only")

    def of_kind(self, sweep: bool | None, newest: bool = False) -> list[StoredRun]:
        """Return the runs, the newest first; `newest`: only the newest page of them.

        sweep: only the parent runs of sweeps, or only the others; None: all.
        """
        runs = self._search(("sweep", "true") if sweep else None, newest)
        return [run for run in runs if sweep is not False or "sweep" not in run.tags]

    def find(self, word: str, sweep: bool | None = False) -> StoredRun:
        """Return the run that is `last`, or has this id or beginning of one, or raise ConfigError.

        sweep: it has to be the parent run of a sweep, or one that trains; None: either, and the
        last one is then no job of a sweep.
        """
        kind = "sweep" if sweep else "run"
        if not isinstance(word, str):
            raise ConfigError(f"{kind}: must be a text, as in 'last' or an id, and is {word!r}")
        runs = self.of_kind(sweep, newest=word == "last")
        if word == "last":
            runs = [run for run in runs if sweep is not None or not run.parent]
        if not runs:
            words = "train -m optimizer.lr=0.01,0.1" if sweep else "train"
            raise ConfigError(
                f"{self.uri}: it holds no {kind}s yet. To make one: mnist-exp {words}"
            )
        if word == "last":
            return runs[0]
        matching = [run for run in runs if word and run.id.startswith(word)]
        if not matching:
            if word:
                self._refuse_other_kind(word, sweep)
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
        """Raise ConfigError where a sweep is meant and it is a run, or the other way round."""
        runs = [run for run in self._search() if run.id.startswith(word)]
        if len(runs) != 1 or sweep is None:
            return
        if not sweep:
            children = [run.id[:8] for run in self.children(runs[0].id).values()]
            text = (
                f"it is a sweep, not a run. Its runs: {', '.join(children[:5])}. Its seeds "
                f"together: mnist-exp evaluate {word} --ensemble"
            )
        elif runs[0].parent:
            text = f"it is a run of the sweep {runs[0].parent[:8]}"
        else:
            text = f"it is a run, not a sweep. To evaluate it: mnist-exp evaluate {word}"
        raise ConfigError(f"{word}: {text}")

    def page(self, word: str | None) -> str:
        """Return the UI's page of a run, as for `find`, or, for None, of the newest experiment."""
        if word is not None:
            run = self.find(word, sweep=None)
            return ui_view.run_page(run.experiment_id, run.id)
        runs = self._search(newest=True)
        if not runs:
            return ""
        experiment = self.client.get_experiment(runs[0].experiment_id)
        return ui_view.list_page(experiment.experiment_id, saved=ui_view.TAG in experiment.tags)

    def has(self, run_id: str, artifact: str) -> bool:
        """Return whether a run has an artifact of this name, at the top."""
        run = self.get(run_id)
        try:
            if self.database is not None and run.artifacts is not None:
                is_there = (run.artifacts / artifact).exists()
            else:
                is_there = artifact in (file.path for file in self.client.list_artifacts(run_id))
        except Exception as error:  # whatever a network or a file system raises
            log.debug("run %s: no look at %s", run_id, run.artifact_uri, exc_info=error)
            is_there = False
        return is_there or artifact in kept_files.recorded_files(run.folder, run.key)

    def fetch(self, run_id: str, artifact: str, folder: Path) -> Path:
        """Return the path of a copy of a run's artifact, made in a folder. Raises ConfigError.

        It comes from the run's own folder where it is not in its place, but there, as recorded.
        """
        try:
            if (artifacts := self._local_artifacts(run_id)) is None:
                return Path(self.client.download_artifacts(run_id, artifact, str(folder)))
            source, copy = artifacts / artifact, folder / artifact
            folder.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                return Path(shutil.copytree(source, copy, dirs_exist_ok=True))
            return Path(shutil.copyfile(source, copy))
        except Exception as error:  # whatever a network or a file system raises
            run = self.get(run_id)
            reason = _why_not_copied(error)
            kept = f", nor one as it was recorded in its folder, {run.folder}" if run.key else ""
            try:
                copied = kept_files.copy(run.folder, run.key, artifact, folder)
            except OSError as second:
                copied, why = None, _why_not_copied(second)
                kept = f", and the one in its folder, {run.folder}, cannot be copied ({why})"
            if copied is not None:
                log.warning(
                    "run %s: %s is taken from its folder, %s; not from %s: %s",
                    *(run_id[:8], artifact, run.folder, run.artifact_uri, reason),
                )
                return copied
            raise ConfigError(
                f"run {run_id}: it has no artifact {artifact} in {run.artifact_uri} ({reason})"
                f"{kept}"
            ) from error


def _why_not_copied(error: Exception) -> str:
    """Return why a file could not be copied, as the file system or the network says."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    return getattr(error, "strerror", None) or first_line(error)
