"""The private parts of MLflow that this program relies on, all in this one file.

Nothing here is promised by MLflow: the tables of its database and the version of those, how it
makes them, and the names that it gives to images. The version of MLflow is pinned for their sake,
and each of them has to be looked at again when it changes. (The view of its UI is in ui_view.py.)
"""

import functools
import glob
import importlib.util
import json
import logging
import math
import os
import re
import sqlite3
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from mnist_exp.system import files

SQLITE = "sqlite:///"  # how the address of a database that is a file begins
PARENT = "mlflow.parentRunId"  # the tag of a run that belongs to a sweep: the id of the sweep's run
LOGGED_IMAGES = {"mlflow.loggedImages": "True"}  # the tag that makes the UI look for images
RUN_COLOUR = "mlflow.runColor"  # the tag with the colour that the UI gives to a run, "#d55e00"
THUMBNAIL_PIXELS = 256  # the longer side of what the UI shows in a list
LOCK_SECONDS = 5.0  # that a reader waits for the lock of a database
_SETTINGS = {  # of MLflow's own, unless the user has some
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a connection to SQLite must not be used on both sides of a fork: none is kept open
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    # a call to a server that does not answer ends soon, as the uploader tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Point(NamedTuple):
    """A point of a metric of a run."""

    run: str  # its id
    key: str  # the metric
    step: int
    time: int  # ms since 1970
    value: float


def import_mlflow() -> Any:
    """Import MLflow, which takes seconds, with settings that suit it here, and return it."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):  # its import sets them up
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def sqlite_uri(path: Path) -> str:
    """Return the address of a database that is a file; MLflow decodes what is escaped in it."""
    return SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def image_stem(key: str, step: int) -> str:
    """Return how the names of an image's files begin, to which a time and an id are added."""
    return f"{key.replace('/', '~')}+step+{step}+timestamp+"


def image_files(stem: str) -> tuple[str, str]:
    """Return the names of an image's two files: itself, and its thumbnail."""
    return f"{stem}.png", f"{stem}+compressed.webp"


@functools.cache
def schema_version() -> str:
    """Return the version of the tables that the installed MLflow makes: its last migration.

    It is read from the files of the migrations, as the import of mlflow takes seconds.
    """
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    line = r"^{}\s*(?::[^=]+)?=\s*[\"'](\w+)[\"']"
    all_of_them = {m for text in texts for m in re.findall(line.format("revision"), text, re.M)}
    followed = {m for text in texts for m in re.findall(line.format("down_revision"), text, re.M)}
    (last,) = all_of_them - followed
    return str(last)


def inspect_database(path: Path, experiment: str | None) -> tuple[str, dict[str, str] | None]:
    """Return why MLflow could not use a database, or "", and what it holds of an experiment.

    That is its experiment_id, lifecycle_stage and artifact_location; None where it is not there.
    Raises sqlite3.DatabaseError where the file is no database, or damaged.
    """
    query = """
        SELECT CAST(experiment_id AS TEXT) AS experiment_id, lifecycle_stage, artifact_location
        FROM experiments WHERE name = ?"""
    with closing(_open(path)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return "", None
        if not {"alembic_version", "experiments"} <= tables:
            return "it is a database of something else than MLflow", None
        versions = [name for (name,) in database.execute("SELECT * FROM alembic_version")]
        if versions != [newest := schema_version()]:
            return (
                f"its tables are of another version of MLflow ({', '.join(versions)}; this one's "
                f"is {newest}). To convert it: mlflow db upgrade {sqlite_uri(path)}"
            ), None
        database.row_factory = sqlite3.Row
        row = database.execute(query, (experiment,)).fetchone()
    return "", None if row is None else dict(row)


def read_runs(
    path: Path,
    run_id: str | None = None,
    tag: tuple[str, str] | None = None,
    newest: int = -1,
    view: str = "active_only",
) -> list[dict[str, Any]]:
    """Return the runs in a database, the newest first: the columns, and what they have by name.

    That is tags, params, metrics and their steps, and the SHA-256 and the profile of the data.

    MLflow returns the same, after an import that takes seconds.

    Args:
        path: The database.
        run_id: The id of the only run to return, which may have been deleted.
        tag: The name and the value of a tag that the runs must have.
        newest: How many to return at most; -1 for all.
        view: MLflow's word: all, or those that are marked as deleted (deleted_only), or others.
    """
    query = """
        SELECT run_uuid AS id, runs.name, status, CAST(experiment_id AS TEXT) AS experiment_id,
            start_time, end_time, artifact_uri
        FROM runs JOIN experiments USING (experiment_id)
        WHERE CASE WHEN :id IS NULL
            THEN :view = 'all' OR (:view = 'active_only') =
                (runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active')
            ELSE run_uuid = :id END
        AND (:key IS NULL OR EXISTS (SELECT 1 FROM tags
            WHERE tags.run_uuid = runs.run_uuid AND key = :key AND value = :value))
        ORDER BY start_time DESC, run_uuid LIMIT :newest"""
    of_runs = "run_uuid IN (SELECT value FROM json_each(?))"
    key, value = tag or (None, None)
    with closing(_open(path)) as database:
        database.row_factory = sqlite3.Row
        values = {"id": run_id, "key": key, "value": value, "newest": newest}
        rows = database.execute(query, {**values, "view": view}).fetchall()
        empty = ("tags", "params", "metrics", "steps")
        texts = {"digest": "", "profile": ""}
        runs = {r["id"]: {**r, **{name: {} for name in empty}, **texts} for r in rows}
        ids = (json.dumps(list(runs)),)
        for table in ("tags", "params"):
            query = f"SELECT run_uuid, key, value FROM {table} WHERE {of_runs}"
            for run_uuid, key, value in database.execute(query, ids):
                runs[run_uuid][table][key] = value
        for row in database.execute(f"SELECT * FROM latest_metrics WHERE {of_runs}", ids):
            runs[row["run_uuid"]]["metrics"][row["key"]] = _metric(row)
            runs[row["run_uuid"]]["steps"][row["key"]] = row["step"]
        digests = f"""
            SELECT destination_id AS run_uuid, input_tags.value AS digest, dataset_profile
            FROM inputs JOIN input_tags USING (input_uuid)
            LEFT JOIN datasets ON dataset_uuid = source_id
            WHERE input_tags.name = 'sha256' AND {of_runs}"""
        for row in database.execute(digests, ids):
            runs[row["run_uuid"]]["digest"] = row["digest"]
            runs[row["run_uuid"]]["profile"] = row["dataset_profile"] or ""
    return list(runs.values())


def read_ids(path: Path) -> tuple[set[str], int | None]:
    """Return the ids of all runs in a database, and when it was made, in ms since 1970, if known.

    Runs that are marked as deleted are among them.
    """
    with closing(_open(path)) as database:
        ids = {run_id for (run_id,) in database.execute("SELECT run_uuid FROM runs")}
        ((made,),) = database.execute("SELECT MIN(creation_time) FROM experiments")
    return ids, made


def read_models(path: Path, run_id: str) -> list[tuple[str, str]]:
    """Return id and address of the files of the models that a run has logged to a database."""
    query = "SELECT model_id, artifact_location FROM logged_models WHERE source_run_id = ?"
    with closing(_open(path)) as database:
        return [(model_id, place) for model_id, place in database.execute(query, (run_id,))]


def read_registered(path: Path, run_ids: Sequence[str]) -> list[str]:
    """Return the names, with versions, by which models of runs are in a database's registry."""
    query = """
        SELECT name, version FROM model_versions
        WHERE run_id IN (SELECT value FROM json_each(?)) ORDER BY name, version"""
    with closing(_open(path)) as database:
        rows = database.execute(query, (json.dumps(list(run_ids)),))
        return [f"{name} version {version}" for name, version in rows]


def delete_run_for_good(client: Any, path: Path, run_id: str) -> None:
    """Delete a run and the models that it has logged from a database, as `mlflow gc` does.

    That command leaves behind which data sets went into the run and which models came out of it.

    Args:
        client: MLflow's client of the database.
        path: The database.
        run_id: The id of the run.
    """
    store = client._tracking_client.store
    for model_id, _ in read_models(path, run_id):
        store._hard_delete_logged_model(model_id)
    with closing(_open(path)) as database, database:
        of_run = "FROM inputs WHERE destination_id = :id OR source_id = :id"
        tags = f"DELETE FROM input_tags WHERE input_uuid IN (SELECT input_uuid {of_run})"
        database.execute(tags, {"id": run_id})
        database.execute(f"DELETE {of_run}", {"id": run_id})
    store._hard_delete_run(run_id)


def newest_step(run: Any, key: str) -> int:
    """Return the step of the newest point of a metric of MLflow's entity of a run, or 0."""
    return max((metric.step for metric in run.data._metric_objs if metric.key == key), default=0)


def read_history(path: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return the points of a metric in a database: (step, value), in the order of their times."""
    query = "SELECT * FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY timestamp, step"
    with closing(_open(path)) as database:
        database.row_factory = sqlite3.Row
        return [(row["step"], _metric(row)) for row in database.execute(query, (run_id, key))]


def read_points(path: Path, run_ids: Sequence[str]) -> list[Point]:
    """Return all points of all metrics of some runs in a database, in no order."""
    query = """
        SELECT run_uuid, key, step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END
        FROM metrics WHERE run_uuid IN (SELECT value FROM json_each(?))"""
    with closing(_open(path)) as database:
        rows = database.execute(query, (json.dumps(list(run_ids)),))
        return [
            Point(run_id, key, step, time, math.nan if value is None else value)
            for run_id, key, step, time, value in rows
        ]


def _metric(row: sqlite3.Row) -> float:
    """Return the value of a metric in a row of its table."""
    return math.nan if row["is_nan"] else float(row["value"])


def make_database(path: Path) -> None:
    """Make an SQLite database with MLflow's tables, unless it is there; whole, or not at all.

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
    mlflow.MlflowClient(sqlite_uri(part)).search_experiments(max_results=1)
    files.replace(part, path)


def _open(path: Path) -> sqlite3.Connection:
    """Open a database that is there, to read what is in it, or to delete from it.

    It can be written to in any case: what a process that was killed in a commit has left half done
    has to be undone before anybody can read. A file that cannot be written is opened all the same.
    """
    address = f"{path.resolve().as_uri()}?mode=rw"
    return sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS)
