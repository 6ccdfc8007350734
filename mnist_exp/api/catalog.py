"""All runs on record from Python: lists and tables of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from mnist_exp.catalog.compare import Comparison
    from mnist_exp.catalog.listing import Listing
    from mnist_exp.catalog.records import Record


def list_records(
    sweep: str | None = None,
    filters: Sequence[str] = (),
    overrides: Sequence[str] = (),
    *,
    sort: str = "-started",
    limit: int | None = None,
    unfolded: bool = False,
) -> "Listing":
    """Return the runs on record, the newest first, with sweeps in place of their jobs.

    Args:
        sweep: A sweep, whose jobs alone are meant.
        filters: Conditions that hold for all, as in `optimizer.lr>0.05 and model=cnn`. With one,
            jobs of sweeps are in the answer as well.
        overrides: `tracking.uri=...` alone, the store to look into.
        sort: The field to sort by; with a minus in front, the greatest first.
        limit: The greatest number of records.
        unfolded: Jobs of sweeps are in the answer as well.

    Raises:
        ConfigError: A filter or a field is not known, or the store cannot be read.
    """
    from mnist_exp.errors import check_list

    check_list("filters", filters)
    records, _ = load_records(overrides)

    from mnist_exp.catalog import listing
    from mnist_exp.catalog.records import find

    of = None if sweep is None else find(records, sweep, ("sweep",)).jobs
    return listing.list_records(
        records, of, filters=filters, order=sort, limit=limit, unfolded=unfolded
    )


def runs(
    sweep: str | None = None, filters: Sequence[str] = (), overrides: Sequence[str] = ()
) -> "pd.DataFrame":
    """Return a pandas table of the runs on record, jobs of sweeps included, a row for each.

    The columns are those of `mnist-exp runs --csv`: id, name, status, params.NAME, metrics.NAME,
    tags.NAME and so on. The arguments, and what is raised, are those of `list_records`.
    """
    found = list_records(sweep, filters, overrides, unfolded=True)

    from mnist_exp.catalog import tables

    return tables.runs_table(found.records)


def field_names(overrides: Sequence[str] = ()) -> list[str]:
    """Return the names of all fields that the runs on record have, for filters and orders.

    `overrides`: `tracking.uri=...` alone, the store to look into. Raises ConfigError.
    """
    from mnist_exp.catalog import fields

    records, _ = load_records(overrides)
    return fields.names(records)


def compare(words: Sequence[str], overrides: Sequence[str] = ()) -> "Comparison":
    """Return a comparison of runs or of cells of sweeps: what differs, metrics and tests.

    Args:
        words: Two or more runs; or two or more of SWEEP, whose chosen cell is meant, SWEEP:RANK
            and SWEEP:KEY=VALUE,KEY=VALUE. Tests are of each against the first.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: There is no such run or cell, they are not of one kind, or one is there twice.
    """
    from mnist_exp.errors import check_list

    check_list("words", words)
    records, _ = load_records(overrides)

    from mnist_exp.catalog import compare as comparing

    return comparing.compare(records, words)


def load_records(overrides: Sequence[str]) -> "tuple[list[Record], str]":
    """Return all runs of the store that the overrides name, and its address. Raise ConfigError."""
    from mnist_exp.catalog import records
    from mnist_exp.run import lookup

    uri = lookup.store_uri(overrides, required=False)
    return records.load_records(uri, lookup.open_runs()), uri
