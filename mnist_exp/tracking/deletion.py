"""Deleting runs from a store: their rows, and the files that the store keeps of them."""

import os
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mnist_exp.errors import ConfigError, first_line
from mnist_exp.tracking import mlflow_internals
from mnist_exp.tracking.address import artifact_root, database_file, named
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import StoredRun


@dataclass(frozen=True)
class StoredFiles:
    """The folders of a run's artifacts and models that may be removed, and what may not be."""

    folders: Sequence[Path]  # real paths
    left: Sequence[str] = ()  # each with the reason


def can_delete_for_good(store: Store) -> bool:
    """Return whether runs can be deleted for good; a server only marks them as deleted."""
    return store.database is not None


def files_of(store: Store, run: StoredRun) -> StoredFiles:
    """Return what a store keeps of a run in files, as far as it is there.

    Only folders below the store's own folder for artifacts, which are named by the run or by its
    model, may be removed. A symbolic link is never followed.
    """
    if store.database is None:
        return StoredFiles(())
    root = _real_path(artifact_root(store.database))
    models = store.read_database(mlflow_internals.read_models, run.id)
    places = [(run.id, run.artifact_uri), *models]
    folders, left = [], []
    for name, address in places:
        if urlsplit(address).scheme not in ("", "file"):
            left.append(f"{address}: it is not in the file system")
            continue
        place = Path(unquote(urlsplit(address).path))
        if place.name == "artifacts":
            place = place.parent
        if not os.path.lexists(place):
            continue
        real = Path(os.path.realpath(place))
        if place.is_symlink() or root not in real.parents:
            left.append(f"{place}: it is outside of {root}, the store's folder for artifacts")
        elif real.name != name:
            left.append(f"{place}: its name is not {name}")
        else:
            folders.append(real)
    return StoredFiles(folders, left)


def _real_path(address: str) -> Path:
    return Path(os.path.realpath(unquote(urlsplit(address).path)))


def registered_models(store: Store, runs: Sequence[StoredRun]) -> list[str]:
    """Return the names by which models of runs are in the model registry. Raise ConfigError.

    A server is asked once for each run.
    """
    ids = [run.id for run in runs]
    if store.database is not None:
        return store.read_database(mlflow_internals.read_registered, ids)
    try:
        return [
            f"{version.name} version {version.version}"
            for run_id in ids
            for version in store.client.search_model_versions(f"run_id='{run_id}'")
        ]
    except Exception as error:  # whatever a network raises
        raise ConfigError(
            f"{named(store.uri)}: its model registry cannot be read, {first_line(error)}"
        ) from error


def ids_in(uri: str) -> tuple[set[str], int | None]:
    """Return the ids of all runs of a store, and when it was made, in ms since 1970, if known.

    Runs that are marked as deleted are among them. Raises ConfigError where the store cannot be
    opened. It is never made anew.
    """
    database = database_file(uri)
    if database is not None:
        if not database.exists():
            raise ConfigError(f"{uri}: there is no such file")
        try:
            return mlflow_internals.read_ids(database)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{uri}: it cannot be read, {error}") from error
    check_store(uri)
    store = Store(uri)
    return {run.id for run in store.everything()}, store.made_at()


def delete(store: Store, runs: Sequence[StoredRun]) -> None:
    """Delete runs one after the other: from an SQLite database for good, with their files.

    In other stores they are marked as deleted, as nobody but their owner can do more. Each step
    can be taken again. Raises whatever MLflow or the file system raises.
    """
    for run in runs:
        if store.database is None:
            if store.client.get_run(run.id).info.lifecycle_stage == "active":
                store.client.delete_run(run.id)
            continue
        for folder in files_of(store, run).folders:
            shutil.rmtree(folder)
        client = store.client
        with store.lock():
            mlflow_internals.delete_run_for_good(client, store.database, run.id)
