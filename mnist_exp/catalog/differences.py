"""What differs in the records of runs: config, code, versions, machine, data, and how they ended.

A column is one run, or the jobs of a cell, whose values then stand together: "0,1,2".
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError
from mnist_exp.system import files
from mnist_exp.tracking import kept_files
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.kept_files import DIFF
from mnist_exp.tracking.store import Store

Column = Sequence[Record]
MACHINE = ("device", "gpu", "cpu", "threads", "compiled", "stack_size", "launcher")
ABSENT = "-"  # in a table, of what a record does not have


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all columns."""

    group: str  # config, code, machine, data or run
    name: str
    values: Sequence[str | None]  # one a column; None where its record has none


def find_differences(columns: Sequence[Column]) -> tuple[list[Difference], list[str]]:
    """Return what differs, and the names of what ought to be on record and is in no column."""
    found, missing = [], []
    for group, name, of_record in _facts(columns):
        values = [_joined(column, of_record) for column in columns]
        if len(set(values)) > 1:
            found.append(Difference(group, name, values))
        elif values[0] is None and name in ("commit", "data"):
            missing.append(name)
    return found, missing


def lines(found: Sequence[Difference], missing: Sequence[str]) -> list[str]:
    """Return what a person is told of `find_differences`, beside what differs."""
    same = [] if found else ["config, code, machine, data and status are the same"]
    return [*same, f"not on record, so not compared: {', '.join(missing)}"] if missing else same


def _facts(
    columns: Sequence[Column],
) -> Iterator[tuple[str, str, Callable[[Record], str | None]]]:
    """Yield group and name of all that can differ, and a function that looks into a record."""

    def of_params(key: str) -> Callable[[Record], str | None]:
        return lambda record: record.params.get(key)

    def of_tags(key: str) -> Callable[[Record], str | None]:
        return lambda record: record.tags.get(key)

    records = [record for column in columns for record in column]
    for key in sorted({key for record in records for key in record.params}):
        yield "config", key, of_params(key)
    yield "code", "commit", of_tags("mlflow.source.git.commit")
    yield "code", "uncommitted changes", _uncommitted
    versions = {key for record in records for key in record.tags if key.startswith("version.")}
    for key in sorted(versions):
        yield "code", key, of_tags(key)
    for key in MACHINE:
        yield "machine", key, of_tags(key)
    yield "data", "data", lambda record: record.dataset_digest or None
    for split in ("train", "val", "test"):
        yield "data", f"{split} images", _size_of(split)
    yield "run", "epochs", lambda record: str(record.epochs)
    yield "run", "status", lambda record: record.status


def _size_of(split: str) -> Callable[[Record], str | None]:
    def size(record: Record) -> str | None:
        number = record.dataset_sizes.get(split)
        return None if number is None else str(number)

    return size


def _joined(column: Column, of_record: Callable[[Record], str | None]) -> str | None:
    """Return the value of a column's records, or their different values with commas between.

    Return None where it has no record, as a cell whose jobs were never run.
    """
    values = dict.fromkeys(of_record(record) for record in column)
    if len(values) <= 1:
        return next(iter(values), None)
    return ",".join(ABSENT if value is None else value for value in values)


def _uncommitted(record: Record) -> str | None:
    """Return whether a run's code had uncommitted changes, and which: by the digest of the diff."""
    is_dirty = record.tags.get("git_dirty")
    if is_dirty is None:
        return None
    if is_dirty != "true":
        return "none"
    digest = diff_digest(record)
    return f"yes (SHA-256 {digest[:12]})" if digest else "yes (no diff on record)"


def diff_digest(record: Record) -> str:
    """Return the SHA-256 of the uncommitted changes on record; "" where there is no such file."""
    if record.folder is not None and record.key:
        recorded = kept_files.recorded_files(record.folder, record.key)
        if DIFF in recorded:
            path, digest = recorded[DIFF]
            return digest or files.sha256(path)
        if recorded:
            return ""
    if record.stored is None:
        return ""
    store = Store(record.stored.store_uri)
    if not store.has(record.stored.id, DIFF):
        return ""
    with TemporaryDirectory() as temporary:
        try:
            return files.sha256(store.fetch(record.stored.id, DIFF, Path(temporary)))
        except ConfigError:  # it is listed, and cannot be had
            return ""


def curves_of(record: Record, keys: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Return the points (epoch, value) of metrics, by epoch, of those that the record has."""
    if record.open_run is not None:
        history = RunHistory.of(record.open_run.folder)
        found = {key: history.history(key) for key in keys}
    else:
        assert record.stored is not None
        store = Store(record.stored.store_uri)
        wanted = [key for key in keys if key in record.metrics]
        found = {key: sorted(dict(store.history(record.id, key)).items()) for key in wanted}
    return {key: points for key, points in found.items() if points}
