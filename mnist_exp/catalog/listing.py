"""The list of runs: which ones, in which order, and what is said of each."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mnist_exp.catalog import fields
from mnist_exp.catalog.records import TEST_ACCURACY, Record, best_val_accuracy
from mnist_exp.config.names import KEYS_IN_NAME, short_names
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import Table, finite, utc_time


@dataclass(frozen=True)
class Listing:
    """Some of the runs on record, in an order."""

    records: Sequence[Record]
    total: int  # how many there would be without a limit

    def table(self, now: datetime) -> Table:
        """Return a row for each record. `now`: in local time, which times are told by."""
        differing = differences(self.records)
        header = ["id", "name", "started", "status", "epochs", "val", "test"]
        rows = [
            [
                record.id[:8],
                record.name,
                _short_time(record.start_time, now),
                _status(record),
                _progress(record),
                _share(best_val_accuracy(record)),
                _share(record.metrics.get(TEST_ACCURACY)),
                differing[record.id],
                _first_line(record.note),
            ]
            for record in self.records
        ]
        header += ["differs in", "note"]
        used = [i for i in range(len(header)) if i < 7 or any(row[i] for row in rows)]
        return Table([header[i] for i in used], [[row[i] for i in used] for row in rows])

    def as_json(self) -> list[dict[str, Any]]:
        """Return the records as plain values, whose names are stable: docs/runs.md has them."""
        return [as_plain(record) for record in self.records]

    def csv_text(self) -> str:
        """Return the records as CSV: the plain values, then all parameters, metrics and tags."""
        rows = [flat(record) for record in self.records]
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns or ["id"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def list_records(
    records: Sequence[Record],
    of: Sequence[Record] | None = None,
    *,
    filters: Sequence[str] = (),
    order: str = "-started",
    limit: int | None = None,
    unfolded: bool = False,
) -> Listing:
    """Return some of the records: without filters, sweeps stand for their jobs.

    Args:
        records: All of them, the newest first.
        of: Those that can be listed; None for all.
        filters: Texts of `filters.parse`, all of which must hold. Jobs are then looked at as well.
        order: The field to sort by, for `fields.sort`.
        limit: The greatest number of records; None for all.
        unfolded: Jobs are listed as well.

    Raises:
        ConfigError: A filter cannot be read, or there is no such field.
    """
    chosen = list(records if of is None else of)
    if of is None and not filters and not unfolded:
        chosen = [record for record in records if record.kind != "job"]
    if filters:
        from mnist_exp.catalog.filters import parse  # its library takes a while to import

        parsed = [parse(text, records) for text in filters]
        chosen = [record for record in chosen if all(each(record) for each in parsed)]
    if order != "-started" or of is not None:
        chosen = fields.sort(chosen, order, fields.names(records))
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be 1 or more; --all has no limit")
    return Listing(chosen[:limit], len(chosen))


def differences(records: Sequence[Record]) -> dict[str, str]:
    """Return what tells each record from those beside it, by its id: "patience=3 momentum=0.9".

    That is each parameter that is not the same in all, unless its value is that of most of them,
    or the run's name has it.
    """
    values: dict[str, Counter[str]] = {}
    for record in records:
        for key, text in record.params.items():
            values.setdefault(key, Counter())[text] += 1
    several = {key for key, counts in values.items() if len(counts) > 1}
    short = short_names(several)
    usual = {}
    for key in several:
        ((text, count),) = values[key].most_common(1)
        usual[key] = text if 2 * count > values[key].total() else None
    found = {}
    for record in records:
        in_name = KEYS_IN_NAME if record.params.get("tracking.run_name", "None") == "None" else ()
        found[record.id] = " ".join(
            f"{short[key]}={text}"
            for key, text in record.params.items()
            if key in several and text != usual[key]
            if key not in in_name and not key.startswith(("tracking.", "sweep."))
            if not key.endswith("_target_")  # the model's name stands for it
        )
    return found


def as_plain(record: Record) -> dict[str, Any]:
    """Return a record as plain values. Times are in ISO 8601, in UTC; accuracies are 0 to 1."""
    plain: dict[str, Any] = {
        "id": record.id,
        "name": record.name,
        "kind": record.kind,
        "sweep": record.parent or None,
        "status": record.status,
        "reason": record.reason or None,
        "started": utc_time(record.start_time),
        "ended": None if record.end_time is None else utc_time(record.end_time),
        "epochs": record.epochs,
        "epochs_asked": record.epochs_asked or None,
        "best_val_accuracy": finite(best_val_accuracy(record)),
        "test_accuracy": finite(record.metrics.get(TEST_ACCURACY)),
        "note": record.note or None,
        "folder": None if record.folder is None else str(record.folder),
        "in_mlflow": record.open_run is None,
    }
    if record.kind == "sweep":
        plain["jobs"] = dict(Counter(job.status for job in record.jobs))
    plain["params"] = dict(record.params)
    plain["metrics"] = finite(record.metrics)
    plain["tags"] = dict(record.tags)
    return plain


def flat(record: Record) -> dict[str, Any]:
    """Return a record as one level of plain values: params.NAME, metrics.NAME, tags.NAME."""
    plain = as_plain(record)
    groups: dict[str, Mapping[str, Any]] = {
        name: plain.pop(name, {}) for name in ("params", "metrics", "tags")
    }
    plain["jobs"] = " ".join(f"{k}={n}" for k, n in plain.get("jobs", {}).items()) or None
    for group, values in groups.items():
        plain |= {f"{group}.{name}": value for name, value in values.items()}
    return plain


def _short_time(milliseconds: int, now: datetime) -> str:
    """Return a time without what is as it is now: 17:29, Nov 26 17:29, 2025-12-31."""
    at = datetime.fromtimestamp(milliseconds / 1000)
    if at.date() == now.date():
        return f"{at:%H:%M}"
    return f"{at:%b} {at.day} {at:%H:%M}" if at.year == now.year else f"{at:%Y-%m-%d}"


def _status(record: Record) -> str:
    text = f"{record.status}: {_first_line(record.reason)}" if record.reason else record.status
    return f"{text} (not in MLflow)" if record.is_waiting else text


def _progress(record: Record) -> str:
    if record.kind != "sweep":
        return f"{record.epochs}/{record.epochs_asked}" if record.epochs_asked else ""
    ended = sum(job.status in ("FINISHED", "FAILED") for job in record.jobs)
    return f"{ended}/{record.jobs_asked} jobs"


def _share(accuracy: float | None) -> str:
    return "" if accuracy is None or math.isnan(accuracy) else f"{accuracy:.2%}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
