"""Runs, or cells of sweeps, beside each other."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from mnist_exp.catalog.compare_runs import RunComparison, compare_runs
from mnist_exp.catalog.records import Record, find
from mnist_exp.errors import ConfigError

if TYPE_CHECKING:  # cells need Hydra and NumPy, and runs do not
    from mnist_exp.catalog.cells import SweepCell
    from mnist_exp.catalog.compare_cells import CellComparison

Comparison: TypeAlias = "RunComparison | CellComparison"


def compare(records: Sequence[Record], words: Sequence[str]) -> Comparison:
    """Return a comparison of runs or of cells.

    Args:
        records: All records, the newest first.
        words: Two or more of one kind: runs, by `last`, an id, its beginning or a folder; or
            cells, as SWEEP, which is the chosen cell, SWEEP:RANK or SWEEP:KEY=VALUE,KEY=VALUE.

    Raises:
        ConfigError: There is no such run or cell, the same is named twice, a run and a sweep are
            mixed, or there is only one.
    """
    if len(words) < 2:
        found = f"{words[0]} alone is" if words else "nothing is"
        raise ConfigError(
            f"{found} named, and two or more are compared: mnist-exp compare RUN RUN, or "
            f"mnist-exp compare SWEEP SWEEP:2"
        )
    found_records: list[Record] = []
    found_cells: list[SweepCell] = []
    meant: dict[tuple[str, int], str] = {}  # a record's id, and the rank of its cell -> its word
    for word in words:
        name, cell_word = split_word(word)
        record = find(records, name, ("sweep",) if cell_word else ())
        rank = 0
        if record.kind == "sweep":
            from mnist_exp.catalog.cells import find_cell

            cell = find_cell(record, cell_word)
            found_cells.append(cell)
            rank = cell.rank
        else:
            found_records.append(record)
        if found_records and found_cells:
            raise _mixed(found_records[0], found_cells[0])
        if (before := meant.get((record.id, rank))) is not None:
            raise ConfigError(f"{word}: it is the same as {before}. Name another one")
        meant[record.id, rank] = word
    if not found_cells:
        return compare_runs(found_records)
    from mnist_exp.catalog.compare_cells import compare_cells

    return compare_cells(found_cells)


def split_word(word: str) -> tuple[str, str]:
    """Return the name of a record and that of a cell, "" where none is named."""
    record, _, cell = word.partition(":")
    if "/" not in record:
        return record, cell
    in_folder = re.fullmatch(r"(.*):([^/]+)", word)  # a folder may have a colon in its name
    return (in_folder[1], in_folder[2]) if in_folder else (word, "")


def _mixed(run: Record, cell: "SweepCell") -> ConfigError:
    jobs = ", ".join(job.id[:8] for job in cell.jobs[:3])
    return ConfigError(
        f"{run.id[:8]} is a {run.kind} and {cell.sweep.id[:8]} a sweep: runs are compared with "
        f"runs, and sweeps with sweeps. Runs of the sweep are {jobs}; all of them: mnist-exp runs "
        f"{cell.sweep.id[:8]}"
    )
