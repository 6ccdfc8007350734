"""What a removal of runs and sweeps would take away, and what it would not."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnist_exp.catalog.own_files import (
    REMOVED,
    evaluation_of,
    is_id,
    outputs,
    own_folder,
)
from mnist_exp.catalog.records import Record, find
from mnist_exp.catalog.removal import Removal, is_job, is_of_another_store, remove_all
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import count_of
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import deletion
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store


@dataclass(frozen=True)
class RemovalPlan:
    """The removals that are to be made, before any is."""

    removals: Sequence[Removal]
    store: Store | None  # None where there is none yet
    open_runs: OpenRuns
    typed: Sequence[str] = ()  # the overrides with which the store was found

    def lines(self) -> list[str]:
        """Return what would go and what would stay, a line each, and how much it is in all."""
        lines = []
        for removal in self.removals:
            lines.append(f"{removal.title}, {size_text(removal.bytes)}")
            lines += [f"  {folder}" for folder in removal.folders]
            lines += [f"  stays: {text}" for text in removal.left]
        runs = count_of(sum(removal.runs for removal in self.removals), "run")
        folders = count_of(sum(len(removal.folders) for removal in self.removals), "folder")
        total = size_text(sum(removal.bytes for removal in self.removals))
        lines.append(f"in all: {runs}, {folders}, {total} with the artifacts")
        if self.store and not deletion.can_delete_for_good(self.store):
            lines.append(
                f"{self.store.uri} marks runs as deleted; its owner frees the files by: mlflow gc"
            )
        return lines

    def as_json(self) -> list[dict[str, Any]]:
        """Return what would go and what would stay as plain values."""
        return [removal.as_json() for removal in self.removals]

    def carry_out(self) -> None:
        """Remove all of it. Raise RunFailed, which says how to go on, where that fails."""

        def to_go_on(rest: Sequence[Removal]) -> str:
            ids = [removal.id[:8] for removal in rest]  # `last` may be another run by now
            return shlex.join(["mnist-exp", "rm", *ids, *self.typed])

        remove_all(self.removals, self.store, self.open_runs, to_go_on)


def size_text(number: int) -> str:
    """Return a number of bytes as text: "4.5 MB"."""
    from rich.filesize import decimal

    return decimal(number)


def plan(
    words: Sequence[str],
    records: Sequence[Record],
    store: Store | None,
    open_runs: OpenRuns,
    typed: Sequence[str] = (),
) -> RemovalPlan:
    """Return what the removal of runs and sweeps would remove.

    Args:
        words: The runs and sweeps: `last`, ids, beginnings of ids, folders.
        records: All records, the newest first.
        store: The store, if there is one.
        open_runs: The registry of the runs that their stores do not have whole.
        typed: The overrides that name the store.

    Raises:
        ConfigError: One of them cannot be removed. Nothing has been changed.
    """
    removals: dict[str, Removal] = {}
    for word in words:
        if word == "last" and (begun := begun_removals()):
            raise ConfigError(
                f"last: the removal of {', '.join(name[:8] for name in begun)} was interrupted, "
                f"and another run may be the last one by now. Name the run by its id. To complete "
                f"the removal: {shlex.join(['mnist-exp', 'rm', begun[0][:8], *typed])}"
            )
        if (interrupted := _left_of(word, records)) is not None:
            removals[interrupted.id] = interrupted
            continue
        record = find(records, word)
        check_removable(record, records)
        jobs = jobs_of(record, records)
        stored = [r.stored for r in (record, *jobs) if r.stored is not None]
        if store is not None and (names := deletion.registered_models(store, stored)):
            raise ConfigError(
                f"{record.kind} {record.id[:8]}: its model is in MLflow's registry, as "
                f"{', '.join(names)}. Delete that first, or keep the run"
            )
        removal = removal_of(record, jobs, store)
        nested = [
            f"{other.id[:8]}  {other.name}: another program has nested it in this run"
            for other in records
            if other.parent == record.id and not is_job(other)
        ]
        removals[record.id] = replace(removal, left=[*removal.left, *nested])
    return RemovalPlan(list(removals.values()), store, open_runs, typed)


def jobs_of(record: Record, records: Sequence[Record]) -> list[Record]:
    """Return the jobs of a sweep among records; they go with it."""
    return [other for other in records if other.parent == record.id and is_job(other)]


def begun_removals() -> list[str]:
    """Return the ids of the runs whose removal has begun and has not come to its end."""
    top = outputs() / REMOVED
    names = sorted(os.listdir(top)) if top.is_dir() and not top.is_symlink() else []
    return [name for name in names if has_been_moved(name)]


def _left_of(word: str, records: Sequence[Record]) -> Removal | None:
    """Return what is left of a removal, where its run is on record no more."""
    top = outputs() / REMOVED
    if len(word) < 4 or "/" in word or not top.is_dir() or top.is_symlink():
        return None
    names = [name for name in sorted(os.listdir(top)) if name.startswith(word)]
    if len(names) != 1 or any(record.id.startswith(word) for record in records):
        return None
    return left_of(names[0])


def left_of(name: str) -> Removal:
    """Return what is left of the removal of a run of this id: what was moved."""
    title = f"what is left of {name[:8]}, whose removal was interrupted"
    return Removal(name, title, None, [], [], [outputs() / REMOVED / name], [])


def check_removable(record: Record, records: Sequence[Record]) -> None:
    """Raise ConfigError for a job of a sweep, and for what may be trained at the moment."""
    name = record.title
    if is_job(record) and any(other.id == record.parent for other in records):
        raise ConfigError(
            f"{name}: it is a job of a sweep, which is removed as a whole: "
            f"mnist-exp rm {record.parent[:8]}"
        )
    if has_been_moved(record.id):  # its removal has begun
        return
    for one in (record, *jobs_of(record, records)):
        if one.is_at_work:
            assert one.open_run is not None
            owner = one.open_run.owner
            raise ConfigError(
                f"{name}: process {owner['pid']} on {owner['host']} is at work on it. Stop it "
                f"first: mnist-exp stop {record.id[:8]}"
            )
        if one.status == "RUNNING" and not _has_ended_here(one):
            raise ConfigError(
                f"{name}: by its record {one.id[:8]} is RUNNING, and no process that trains it "
                f"can be seen from here. Stop it where it is trained; if that machine is gone, "
                f"delete the run in MLflow's UI"
            )


def _has_ended_here(record: Record) -> bool:
    """Return whether the journal of a run that MLflow takes for a running one has ended here."""
    if record.folder is None:
        return False
    try:
        history = RunHistory.of(record.folder)
    except OSError:
        return False
    if not history.key or history.key != record.key:
        return False
    return bool(history.status) or is_running(history.owner) is False


def has_been_moved(run_id: str) -> bool:
    """Return whether the removal of a run has begun, so that it has to be completed."""
    place = outputs() / REMOVED / run_id
    return is_id(run_id) and place.is_dir() and any(place.iterdir())


def removal_of(record: Record, jobs: Sequence[Record], store: Store | None) -> Removal:
    """Return what would be removed with a run or a sweep, and what would not.

    Raises ConfigError where an id or a key is damaged, which no path may be made of.
    """
    for one in (record, *jobs):
        if damaged := [text for text in (one.id, one.key or one.id) if not is_id(text)]:
            raise ConfigError(
                f"{record.title}: by its record, {damaged[0]!r} is "
                f"its id or its key or that of a job. It has to be 32 digits, 0 to 9 and a to f. "
                f"Nothing of it is removed: delete it in MLflow's UI"
            )
    uri = "" if store is None else store.uri
    keys = [r.key for r in (record, *jobs) if r.key or r is record]
    folders: list[Path] = []
    files: list[Path] = []
    left: list[str] = []
    elsewhere: list[Path] = []  # of another store by now
    own = [(record, keys), *((job, [job.key]) for job in jobs)]
    for one, its_keys in own:
        known = [*folders, *elsewhere]
        if one.folder is None or any(f in one.folder.resolve().parents for f in known):
            continue
        folder, reason = own_folder(one.folder, its_keys)
        if folder is not None and is_of_another_store(folder, one.key, uri):
            elsewhere.append(folder)
            left.append(f"{folder}: its record is for {RunHistory.of(folder).uri} by now")
        elif folder is not None:
            folders.append(folder)
        elif reason:
            left.append(f"{one.folder}: {reason}")
    folders.reverse()  # that of the sweep last: it tells whether the removal has begun
    for one in (record, *jobs):
        if one.stored is not None and store is not None:
            stored = deletion.files_of(store, one.stored)
            files += stored.folders
            left += stored.left
        if (figures := evaluation_of(one.id)) is not None:
            files.append(figures)
    if has_been_moved(record.id):
        files.append(outputs() / REMOVED / record.id)
    jobs_text = f" with its {count_of(len(jobs), 'job')}" if record.kind == "sweep" else ""
    waits = "" if record.stored or not record.key else ", which MLflow never had"
    title = f"{record.title}{jobs_text}, {record.status}{waits}"
    return Removal(record.id, title, record, jobs, folders, files, left, uri)
