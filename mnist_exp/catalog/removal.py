"""Taking runs and sweeps away, in steps that can be repeated.

A run goes in this order: its folder moves to outputs/.removed/ID, in one step; its entries of the
registry of open runs go, then its artifacts and its rows in the store, and last what was moved. So
a removal that is interrupted goes on from there by `rm ID`, or by `gc`.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mnist_exp.catalog.own_files import (
    REMOVED,
    evaluation_of,
    is_id,
    journals,
    outputs,
    size_of,
)
from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError, RunFailed, Terminated
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import deletion, journal
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.mlflow_internals import PARENT
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import RUN_KEY, StoredRun
from mnist_exp.tracking.upload import DELIVERY_LOCK

log = logging.getLogger(__name__)

_LOCK_SECONDS = 30.0  # that an upload, or another removal, is waited for


@dataclass(frozen=True)
class Removal:
    """A run or a sweep that is to be removed, or what is left of one whose removal began."""

    id: str
    title: str  # what is said of it
    record: Record | None  # None where only what was moved is left
    jobs: Sequence[Record]
    folders: Sequence[Path]  # that will be moved: real paths
    files: Sequence[Path]  # the others: artifacts, figures, what was moved earlier
    left: Sequence[str]  # what stays, each with the reason
    uri: str = ""  # of the store that its folders are of; "" where that is not asked
    stored: Sequence[StoredRun] | None = None  # that alone go; None: all that have its key

    @cached_property
    def bytes(self) -> int:
        """The size of all that goes."""
        return size_of([*self.folders, *self.files])

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, whose names are stable: docs/tidying.md has them."""
        records = [r for r in (self.record, *self.jobs) if r is not None]
        return {
            "id": self.id,
            "what": self.title,
            "runs": [record.id for record in records],
            "folders": [str(folder) for folder in self.folders],
            "files": [str(place) for place in self.files],
            "stays": list(self.left),
            "bytes": self.bytes,
        }

    @property
    def runs(self) -> int:
        """The number of runs that go."""
        return len(self.jobs) + (self.record is not None)


def remove_all(
    removals: Sequence[Removal],
    store: Store | None,
    open_runs: OpenRuns,
    to_go_on: Callable[[Sequence[Removal]], str],
) -> None:
    """Remove runs and sweeps one after the other, while no other process removes any.

    Args:
        removals: What to remove.
        store: The store, if there is one.
        open_runs: The registry of the runs that their stores do not have whole.
        to_go_on: Returns what to type to go on with the removals that are not complete.

    Raises:
        ConfigError: outputs/ cannot be written. Nothing has been removed.
        RunFailed: Not all of it could be removed.
    """
    with _alone(open_runs.folder):
        for number, removal in enumerate(removals):
            what_to_type = to_go_on(removals[number:])
            try:
                remove(removal, store, open_runs)
            except (KeyboardInterrupt, Terminated):
                log.warning("not all of it is removed. To go on with that: %s", what_to_type)
                raise
            except Exception as error:  # whatever a file system, a database or a network raises
                is_told = isinstance(error, ConfigError | RunFailed)
                reason = str(error) if is_told else f"{type(error).__name__}: {error}"
                raise RunFailed(
                    f"{removal.title}: not all of it is removed. {reason}. To go on with that: "
                    f"{what_to_type}"
                ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of all removals, a file in a folder. Another process may be waited for."""
    lock = FileLock(folder / "removals.lock", timeout=_LOCK_SECONDS)
    try:
        held = lock.acquire()
    except Timeout:
        raise RunFailed(
            f"{lock.lock_file}: another process is removing runs since {_LOCK_SECONDS:.0f} s. Wait "
            f"for its end, and type the same again"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: it cannot be written ({error.strerror}), so nothing is removed from "
            f"there. Make it writable, and type the same again"
        ) from error
    with held:
        yield


def remove(removal: Removal, store: Store | None, open_runs: OpenRuns) -> None:
    """Remove a run or a sweep, or go on with that. Raises whatever MLflow or the disk raises."""
    place = outputs() / REMOVED / removal.id
    if place.parent.is_symlink() or place.is_symlink():
        raise RunFailed(f"{place}: a symbolic link, where a folder has to be. Remove the link")
    if removal.folders:
        place.mkdir(parents=True, exist_ok=True)
    for folder in removal.folders:
        _move(folder, place, removal.uri)
    moved = [path.parent for path in journals(place)] if place.is_dir() else []
    records = [r for r in (*removal.jobs, removal.record) if r is not None]
    own = [r for r in records if not is_of_another_store(r.folder, r.key, removal.uri)]
    keys = {r.key for r in own} | {RunHistory.of(folder).key for folder in moved}
    for key in sorted(filter(is_id, keys)):
        open_runs.remove(key)
    for folder in (*moved, *(r.folder for r in own if r.folder is not None)):
        _wait_for_upload(folder)
    for record in records:
        if (figures := evaluation_of(record.id)) is not None:
            shutil.rmtree(figures)
    if removal.record is not None and store is not None:
        stored = removal.stored
        deletion.delete(store, stored_runs(removal.record, store) if stored is None else stored)
    if place.is_dir():
        shutil.rmtree(place)


def _move(folder: Path, place: Path, uri: str) -> None:
    """Move the folder of a run of a store to a place, unless it is being trained by now."""
    if not journal.size(folder):  # another process has moved it
        return
    with journal.lock(folder):
        history = RunHistory.of(folder)
        if not is_id(history.key):
            raise RunFailed(f"{folder}: its record cannot be read any more. It stays")
        if is_of_another_store(folder, history.key, uri):
            raise RunFailed(f"{folder}: its record is for {history.uri} by now. It stays")
        if not history.status and is_running(history.owner) is not False:
            raise RunFailed(f"{folder}: a process is at work on it by now. It stays")
        target = place / history.key
        if target.exists():  # of a removal before its run's folder was put back
            shutil.rmtree(target)
        os.rename(folder, target)


def _wait_for_upload(folder: Path) -> None:
    """Wait for an upload of a run that began before: it could make in the store what is deleted."""
    lock = folder / DELIVERY_LOCK
    if not lock.exists():
        return
    try:
        with FileLock(lock, timeout=_LOCK_SECONDS):
            pass
    except Timeout:
        raise RunFailed(
            f"{folder}: it is being uploaded to MLflow since {_LOCK_SECONDS:.0f} s"
        ) from None


def stored_runs(record: Record, store: Store) -> list[StoredRun]:
    """Return the runs that a store has of a record by now, the jobs of a sweep first.

    An upload may have made one since the records were read.
    """
    own = [run for run in [record.stored] if run is not None]
    if record.key:
        own = store.with_tag(RUN_KEY, record.key)
    children = [child for run in own for child in store.with_tag(PARENT, run.id)]
    return [*filter(is_job, children), *own]


def is_job(record: Record | StoredRun) -> bool:
    """Return whether a run is a job of a sweep, and not one that another program has nested."""
    return bool(record.key and record.parent and record.tags.get("job", "").isdecimal())


def is_of_another_store(folder: Path | None, key: str, uri: str) -> bool:
    """Return whether the record of a run was sent to another store, which may wait for it.

    Args:
        folder: The folder of the run, if that is known.
        key: The key of the run.
        uri: The address of the store; "" where that is not asked.
    """
    if folder is None or not uri or not folder.is_dir():
        return False
    history = RunHistory.of(folder)
    return history.key == key and history.uri not in ("", uri)
