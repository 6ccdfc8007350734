"""The records of runs from Python: their notes and tags."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_exp.catalog.annotate import Annotated
    from mnist_exp.catalog.records import Record


def note(run: str = "last", text: str | None = None, overrides: Sequence[str] = ()) -> "Annotated":
    """Give a run or a sweep a note, which its description in MLflow begins with.

    Args:
        run: The run, the sweep, or a job of one.
        text: The note; "" removes the one that is there, and None leaves it as it is.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run, or MLflow would refuse the note. Nothing has changed.
    """
    from mnist_exp.catalog import annotate
    from mnist_exp.catalog.records import find
    from mnist_exp.run import lookup

    records, uri = _records(overrides)
    record = find(records, run)
    if text is None:
        return annotate.annotated(record)
    return annotate.set_note(record, text, uri, lookup.open_runs())


def tag(
    run: str = "last", tags: Mapping[str, str] | None = None, overrides: Sequence[str] = ()
) -> "Annotated":
    """Give a run or a sweep tags: `tag("last", {"team": "vision"})`.

    Args:
        run: The run, the sweep, or a job of one.
        tags: The tags, in place of those of the same names; None leaves all as they are.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run, or a tag cannot be given. Nothing has changed.
    """
    from mnist_exp.catalog import annotate
    from mnist_exp.catalog.records import find
    from mnist_exp.run import lookup

    records, uri = _records(overrides)
    record = find(records, run)
    if not tags:
        return annotate.annotated(record)
    return annotate.set_tags(record, tags, uri, lookup.open_runs())


def _records(overrides: Sequence[str]) -> "tuple[list[Record], str]":
    """Return all runs of the store that the overrides name, and its address. Raise ConfigError."""
    from mnist_exp.catalog.records import load_records
    from mnist_exp.run import lookup

    uri = lookup.store_uri(overrides, required=False)
    return load_records(uri, lookup.open_runs()), uri
