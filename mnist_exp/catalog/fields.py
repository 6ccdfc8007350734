"""The fields of a record: what a filter, an order or a column can name.

A field is one of the own fields below, or a parameter, a metric or a tag of the record by its name,
as in `optimizer.lr`, `val/accuracy` or `model`. The last part of a name will do where only one name
ends so: `lr`.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mnist_exp.catalog.records import TEST_ACCURACY, Record, best_val_accuracy
from mnist_exp.errors import ConfigError, did_you_mean

Value = str | float | None  # None where a record has no such field

_OWN: dict[str, Callable[[Record], Value]] = {
    "id": lambda record: record.id,
    "name": lambda record: record.name,
    "kind": lambda record: record.kind,
    "sweep": lambda record: record.parent or None,
    "status": lambda record: record.status,
    "reason": lambda record: record.reason or None,
    "started": lambda record: iso_time(record.start_time),
    "ended": lambda record: None if record.end_time is None else iso_time(record.end_time),
    "seconds": lambda record: record.seconds(time.time()),
    "epochs": lambda record: float(record.epochs),
    "epochs_asked": lambda record: float(record.epochs_asked) or None,
    "best_val_accuracy": best_val_accuracy,
    "test_accuracy": lambda record: record.metrics.get(TEST_ACCURACY),
    "note": lambda record: record.note or None,
    "folder": lambda record: str(record.folder) if record.folder else None,
    "in_mlflow": lambda record: "true" if record.open_run is None else "false",
}
_SOURCES: dict[str, Callable[[Record], Mapping[str, Any]]] = {
    "params": lambda record: record.params,
    "metrics": lambda record: record.metrics,
    "tags": lambda record: record.tags,
}


def iso_time(milliseconds: int) -> str:
    """Return a time, in ms since 1970, in ISO 8601 in the local zone: 2026-11-27T17:29:34.120."""
    return datetime.fromtimestamp(milliseconds / 1000).isoformat(timespec="milliseconds")


def value(record: Record, name: str) -> Value:
    """Return a field of a record by its full name; a number where its text is one.

    A parameter comes before a metric, and a metric before a tag, where they have one name;
    `tags.NAME`, `metrics.NAME` and `params.NAME` tell them apart.
    """
    if name in _OWN:
        return _OWN[name](record)
    kind, _, rest = name.partition(".")
    places = [(_SOURCES[kind], rest)] if kind in _SOURCES else []
    places += [(source, name) for source in _SOURCES.values()]
    for source, key in places:
        if (found := source(record).get(key)) is not None:
            return found if isinstance(found, float) else parsed(found)
    return None


def parsed(text: str) -> Value:
    """Return the number that a text is, or the text; None for what stands for nothing."""
    if text in ("", "None"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def names(records: Iterable[Record]) -> list[str]:
    """Return the names of all fields that the records have: own fields first, then sorted."""
    found: set[str] = set()
    for record in records:
        found.update(record.params, record.metrics, record.tags)
    return [*_OWN, *sorted(found - _OWN.keys())]


def full_name(name: str, known: Sequence[str]) -> str:
    """Return the full name of a field that may be shortened to its last part.

    Args:
        name: The name as it was typed.
        known: All full names.

    Raises:
        ConfigError: There is no such field, or several names end so.
    """
    kind, _, rest = name.partition(".")
    if name in known or (kind in _SOURCES and rest in known):
        return name
    ending = [full for full in known if re.split(r"[./]", full)[-1] == name]
    ending += [full for full in known if full.endswith((f".{name}", f"/{name}"))]
    matching = list(dict.fromkeys(ending))
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(f"{name}: several fields end so: {', '.join(matching)}. Name one of them")
    parts = {part: full for full in known for part in (re.split(r"[./]", full)[-1], full)}
    raise ConfigError(
        f"{name or repr(name)}: no run has such a field. {did_you_mean(name, parts)}A field is a "
        f"parameter, a metric or a tag, or one of {', '.join(_OWN)}"
    )


def sort(records: Sequence[Record], order: str, known: Sequence[str]) -> list[Record]:
    """Return the records by a field, which a minus in front turns round.

    Numbers come before texts, and records that have no such field come last, either way.

    Args:
        records: The records.
        order: The name of the field, as in `val/accuracy` or `-started`.
        known: The full names of all fields.

    Raises:
        ConfigError: There is no such field.
    """
    name = full_name(order.removeprefix("-"), known)
    with_field: list[tuple[float | str, Record]] = []
    without: list[Record] = []
    for record in records:
        found = value(record, name)
        if found is None or (isinstance(found, float) and math.isnan(found)):
            without.append(record)
        else:
            with_field.append((found, record))
    with_field.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]))
    if order.startswith("-"):
        with_field.reverse()
    return [record for _, record in with_field] + without
