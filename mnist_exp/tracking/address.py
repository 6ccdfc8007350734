"""The address of an MLflow store: which one is meant, and how a message names it."""

import logging
import os
from pathlib import Path
from urllib.parse import unquote

from mnist_exp.errors import ConfigError
from mnist_exp.tracking.mlflow_internals import SQLITE, sqlite_uri

log = logging.getLogger(__name__)

ENVIRONMENT = "MLFLOW_TRACKING_URI"


def store_uri(uri: str | None, root: Path) -> str:
    """Return MLFLOW_TRACKING_URI if it is set, else `uri`, else SQLite in the folder `root`."""
    return _from_environment() or normalised(uri or "") or sqlite_uri(root / "mlflow.db")


def _from_environment() -> str:
    return normalised(os.environ.get(ENVIRONMENT, ""))


def normalised(uri: str) -> str:
    """Return an address in the one form that it has in records: of a file, its absolute path."""
    path = database_file(uri)
    return uri if path is None or "?" in uri else sqlite_uri(path.absolute())


def database_file(uri: str) -> Path | None:
    """Return the file of a store that is an SQLite database, or None."""
    path = unquote(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else ""
    return Path(path) if path.strip() else None


def artifact_root(database: Path) -> str:
    """Return the address of the folder that holds the files of the runs in an SQLite database."""
    return (database.resolve().parent / "mlruns").as_uri()


def warn_if_environment_wins(uri: str | None) -> None:
    """Warn where the environment names another store than `uri`, which was typed."""
    used = _from_environment()
    if uri is not None and used and used != normalised(uri):
        log.warning("%s=%s is used, and not tracking.uri=%s", ENVIRONMENT, used, uri)


def named(uri: str, option: str = "") -> str:
    """Return a store with what has named it, which would have to be changed."""
    if option:
        return f"{option} {uri}"
    return f"{ENVIRONMENT if _from_environment() == uri else 'tracking.uri'}={uri}"


def how_to_choose(uri: str, option: str = "") -> str:
    """Return how to name another store, where this one will not do."""
    if option:
        return f"choose another store: {option} sqlite:////ABSOLUTE/PATH.db"
    if _from_environment() == uri:
        return f"set {ENVIRONMENT} to another store, or unset it: it counts before tracking.uri"
    return "choose another store: tracking.uri=sqlite:////ABSOLUTE/PATH.db"


def deleted_experiment(uri: str, name: str, number: object) -> ConfigError:
    """Return the error of an experiment that was deleted."""
    return ConfigError(
        f"tracking.experiment={name}: it was deleted. Choose another name, or restore it: "
        f"{ENVIRONMENT}={uri} mlflow experiments restore -x {number}"
    )
