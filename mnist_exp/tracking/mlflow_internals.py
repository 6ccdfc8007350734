"""The private parts of MLflow that this program relies on, all in this one file.

Nothing here is promised by MLflow: the tables of its database and the version of those, how it
makes them, and the names that it gives to images. The version of MLflow is pinned for their sake,
and each of them has to be looked at again when it changes. (The view of its UI is in ui_view.py.)
"""

import functools
import glob
import importlib.util
import logging
import os
import re
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

from mnist_exp.system import files

SQLITE = "sqlite:///"  # how the address of a database that is a file begins
PARENT = "mlflow.parentRunId"  # the tag of a run that belongs to a sweep: the id of the sweep's run
LOGGED_IMAGES = {"mlflow.loggedImages": "True"}  # the tag that makes the UI look for images
THUMBNAIL_PIXELS = 256  # the longer side of what the UI shows in a list
_SETTINGS = {  # of MLflow's own, unless the user has some
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a connection to SQLite must not be used on both sides of a fork: none is kept open
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    # a call to a server that does not answer ends soon, as the uploader tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


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
    with closing(_open_to_read(path)) as database:
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


def runs_in_database(path: Path, sweep: bool | None) -> list[tuple[str, str]]:
    """Return id and name of each run in a database, the newest first; sweep: as Store.of_kind."""
    query = """
        SELECT runs.run_uuid, runs.name FROM runs JOIN experiments USING (experiment_id)
        LEFT JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'sweep'
        WHERE runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'
        AND (:sweep IS NULL OR :sweep = (tags.value IS NOT NULL))
        ORDER BY runs.start_time DESC, runs.run_uuid"""
    with closing(_open_to_read(path, timeout=1)) as database:
        return list(database.execute(query, {"sweep": sweep}))


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


def _open_to_read(path: Path, timeout: float = 5.0) -> sqlite3.Connection:
    """Open a database without making or changing it. timeout: seconds to wait for its lock."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=timeout)
