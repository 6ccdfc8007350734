"""Tables of the runs on record and of all points of their metrics, and the files of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp.catalog.listing import Listing, flat, list_records
from mnist_exp.catalog.records import Record, find
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import count_of, finite
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.mlflow_internals import Point
from mnist_exp.tracking.store import Store

if TYPE_CHECKING:  # it takes half a second to import
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".json")
OPTION = "--to"


@dataclass(frozen=True)
class TableFiles:
    """The files of an export, with the number of rows of the two tables."""

    metrics: Path
    runs: Path  # the same file, if the format holds both tables
    points: int
    records: int

    def lines(self) -> list[str]:
        """Return what a person is told: a line for each table."""
        return [
            f"metrics  {self.metrics}  {count_of(self.points, 'point')}",
            f"runs     {self.runs}  {count_of(self.records, 'run')}",
        ]


def choose(
    records: Sequence[Record], words: Sequence[str], filters: Sequence[str]
) -> Sequence[Record]:
    """Return the records that are named, sweeps with their jobs, or all of them if none is named.

    Args:
        records: All of them, the newest first.
        words: Names of runs and sweeps, as for `records.find`.
        filters: Conditions that hold for all that is returned.

    Raises:
        ConfigError: There is no such run, or a filter cannot be read.
    """
    named = records
    if words:
        meant = [find(records, word) for word in words]
        ids = {each.id for record in meant for each in (record, *record.jobs)}
        named = [record for record in records if record.id in ids]
    return list_records(records, named, filters=filters, unfolded=True).records


def points_of(records: Sequence[Record], uri: str) -> list[Point]:
    """Return all points of the metrics of some records, run by run and by their times.

    Args:
        records: The records. What the store does not have whole is read from the journal.
        uri: The address of the store.

    Raises:
        ConfigError: The store cannot be read.
    """
    stored = [r.stored for r in records if r.open_run is None and r.stored is not None]
    points: list[Point] = Store(uri).points(stored) if stored else []
    for record in records:
        if record.open_run is not None:
            points += _points_in_journal(record.id, record.open_run.folder)
    place = {record.id: number for number, record in enumerate(records)}
    return sorted(points, key=lambda point: (place[point.run], point.time, point.step))


def _points_in_journal(run_id: str, folder: Path) -> Iterator[Point]:
    entries, _ = journal.read(folder)
    for entry in entries:
        if entry.kind == "metrics":
            for key, value in entry.fields["values"].items():
                yield Point(run_id, key, entry.fields["step"], entry.time, float(value))


def metrics_table(points: Sequence[Point]) -> "pd.DataFrame":
    """Return a row for each point: run, key, step, time (UTC), value."""
    import pandas as pd

    table = pd.DataFrame(points, columns=Point._fields)
    types = {"run": "str", "key": "str", "step": "int64", "value": "float64"}
    times = pd.to_datetime(table["time"].astype("int64"), unit="ms", utc=True)
    table["time"] = times.dt.as_unit("ms")
    return table.astype(types)


def runs_table(records: Sequence[Record]) -> "pd.DataFrame":
    """Return a row for each record, with the columns of `mnist-exp runs --csv`."""
    import pandas as pd

    return pd.DataFrame([flat(record) for record in records])


def check_target(path: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Raise ConfigError if a file of an export could not be written.

    Args:
        path: The file.
        suffixes: What its name may end in.
        force: Files that exist may be replaced.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(
            f"{OPTION} {path}: must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}"
        )
    for file in _files(path):
        with files.reporting_write_errors(OPTION, file):
            files.check_writable_file(file)
        if file.exists() and not force:
            raise ConfigError(
                f"{OPTION} {path}: {file} exists already. To replace it: --force; or choose "
                f"another name"
            )


def _files(path: Path) -> list[Path]:
    """Return the files of an export: of metrics, and of runs if those need another one."""
    if path.suffix.lower() in (".csv", ".parquet"):
        return [path, path.with_name(f"{path.stem}.runs{path.suffix}")]
    return [path]


def write(records: Sequence[Record], points: Sequence[Point], path: Path) -> TableFiles:
    """Write the table of metrics and that of runs, each file whole or not at all.

    Args:
        records: The runs.
        points: Those of their metrics.
        path: The file of the metrics; its suffix is the format.

    Raises:
        ConfigError: A file cannot be written.
    """
    metrics, runs = _files(path)[0], _files(path)[-1]
    with files.reporting_write_errors(OPTION, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".csv":
            files.write(runs, Listing(records, len(records)).csv_text())
            files.write(metrics, _metrics_csv(points))
        elif path.suffix.lower() == ".parquet":
            _write_parquet(runs_table(records), runs, times=("started", "ended"))
            _write_parquet(metrics_table(points), metrics)
        else:
            files.write(path, _as_json(records, points))
    return TableFiles(metrics.resolve(), runs.resolve(), len(points), len(records))


def _metrics_csv(points: Sequence[Point]) -> str:
    table = metrics_table(points)
    table["time"] = _iso_times(table["time"])
    return str(table.to_csv(index=False))


def _iso_times(times: "pd.Series[pd.Timestamp]") -> list[str]:
    """Return times in ISO 8601 in UTC, as in the table of runs: 2026-11-27T17:29:34.123+00:00."""
    import numpy as np

    naive = times.dt.tz_localize(None).to_numpy()
    return [f"{text}+00:00" for text in np.datetime_as_string(naive, unit="ms")]


def _write_parquet(table: "pd.DataFrame", path: Path, times: Sequence[str] = ()) -> None:
    """Write a table; the columns `times` have ISO 8601, and become timestamps."""
    import pandas as pd

    for name in times:
        table[name] = pd.to_datetime(table[name], utc=True, format="ISO8601")
    files.write(path, lambda file: table.to_parquet(file, index=False))


def _as_json(records: Sequence[Record], points: Sequence[Point]) -> str:
    times = _iso_times(metrics_table(points)["time"])
    rows = [
        {**point._asdict(), "time": time, "value": finite(point.value)}
        for point, time in zip(points, times, strict=True)
    ]
    runs = Listing(records, len(records)).as_json()
    return json.dumps({"runs": runs, "metrics": rows}) + "\n"
