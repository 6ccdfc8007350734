"""Cells of sweeps beside each other: means over their seeds, and tests over common seeds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnist_exp.catalog import differences, significance
from mnist_exp.catalog.cells import SweepCell
from mnist_exp.catalog.compare_runs import CURVES, difference_table, short_ids
from mnist_exp.catalog.differences import ABSENT, Difference
from mnist_exp.catalog.significance import PairedTest
from mnist_exp.formatting import MeanStd, Table, count_of

# what is shown -> the metric of a run
ACCURACIES = {"validation accuracy": "best/val_accuracy", "test accuracy": "test/accuracy"}


@dataclass(frozen=True)
class CellComparison:
    """Cells beside each other; tests are of each against the first."""

    cells: Sequence[SweepCell]
    labels: Sequence[str]  # ID:RANK
    differences: Sequence[Difference]
    not_recorded: Sequence[str]
    tests: Sequence[dict[str, PairedTest]]  # by metric, one for each cell but the first

    def titles(self) -> list[str]:
        """Return a line for each cell: its values, and what became of its jobs."""
        lines = []
        for label, each in zip(self.labels, self.cells, strict=True):
            counts = Counter(job.status for job in each.cell.jobs)
            statuses = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            chosen = " (chosen)" if each.is_chosen else ""
            lines.append(f"{label}  {each.cell.label}{chosen}  {statuses}")
        return lines

    def tables(self) -> list[tuple[str, Table]]:
        """Return the tables of what differs, of metrics and of tests, with their titles."""
        found = [("what differs", difference_table(self.differences, self.labels))]
        rows = [
            [name, *(_text(_spread(each, key)) for each in self.cells)]
            for name, key in ACCURACIES.items()
        ]
        epochs = [each.cell.best_epoch for each in self.cells]
        rows.append(["best epoch", *(ABSENT if e is None else f"{e:g}" for e in epochs)])
        rows = [row for row in rows if {*row[1:]} != {ABSENT}]
        found.append(("mean ± standard deviation (n)", Table(["metric", *self.labels], rows)))
        rows = [
            [f"{label} less {self.labels[0]}", name, *_test_texts(tests[key])]
            for label, tests in zip(self.labels[1:], self.tests, strict=True)
            for name, key in ACCURACIES.items()
            if tests[key].difference is not None
        ]
        header = [
            "cells",
            "metric",
            "seeds",
            "difference, points",
            "95 % interval",
            "paired t-test",
        ]
        found.append(("over the seeds that both have", Table(header, rows)))
        return [(title, table) for title, table in found if table.rows]

    def lines(self) -> list[str]:
        """Return what else there is to say, a line each."""
        found = differences.lines(self.differences, self.not_recorded)
        for label, each in zip(self.labels, self.cells, strict=True):
            left = len(each.cell.jobs) - len(each.cell.finished)
            if left:
                jobs = count_of(left, "job")
                found.append(f"{label}: {jobs} did not finish, and the means are over the others")
        for label, tests in zip(self.labels[1:], self.tests, strict=True):
            for name, key in ACCURACIES.items():
                is_known = any(each.by_seed(key) for each in self.cells)
                if is_known and (reason := tests[key].reason):
                    found.append(f"{label} and {self.labels[0]}, {name}: no test, as {reason}")
        return found

    @property
    def to_evaluate(self) -> list[str]:
        """The ids of runs to evaluate before: none, as cells are compared by their metrics."""
        return []

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain values, whose names are stable: docs/runs.md has them."""
        columns = [
            {
                "sweep": each.sweep.id,
                "cell": each.cell.label,
                "rank": each.rank,
                "chosen": each.is_chosen,
                "values": dict(each.cell.values),
                "jobs": dict(Counter(job.status for job in each.cell.jobs)),
                "run_ids": [record.id for record in each.jobs],
            }
            for each in self.cells
        ]
        metrics = []
        for key in ACCURACIES.values():
            spreads = [_spread(each, key) for each in self.cells]
            values = [None if spread is None else asdict(spread) for spread in spreads]
            metrics.append({"name": key, "values": values})
        return {
            "kind": "cells",
            "columns": columns,
            "differences": [asdict(each) for each in self.differences],
            "not_recorded": list(self.not_recorded),
            "metrics": metrics,
            "tests": [{key: asdict(test) for key, test in tests.items()} for tests in self.tests],
        }

    def draw(self) -> Any:
        """Return a figure of the curves of all cells: the means over their seeds.

        Cells of one sweep have the colours that its report gives them, if it gives each its own.
        """
        from mnist_exp.figures import curves

        is_one_sweep = len({each.sweep.id for each in self.cells}) == 1
        lines = {}
        first = self.cells[0]
        of_report = curves.cell_colours(first.ranking, first.chosen) if is_one_sweep else {}
        colours = dict(of_report)  # those of cells that are not drawn are left to them
        for label, each in zip(self.labels, self.cells, strict=True):
            name = f"{label} {each.cell.label}"
            lines[name] = [differences.curves_of(job, CURVES) for job in each.jobs]
            if (colour := of_report.get(each.cell.label)) is not None:
                colours[name] = colour
        return curves.comparison_curves(lines, colours, f"{len(lines)} cells")


def compare_cells(cells: Sequence[SweepCell]) -> CellComparison:
    """Return a comparison of two cells or more."""
    found, missing = differences.find_differences([each.jobs for each in cells])
    first, *others = cells
    tests = [
        {
            key: significance.paired_test(first.by_seed(key), other.by_seed(key))
            for key in ACCURACIES.values()
        }
        for other in others
    ]
    ids = list({each.sweep.id: None for each in cells})
    short = dict(zip(ids, short_ids(ids), strict=True))
    labels = [f"{short[each.sweep.id]}:{each.rank}" for each in cells]
    return CellComparison(cells, labels, found, missing, tests)


def _spread(each: SweepCell, metric: str) -> MeanStd | None:
    is_val = metric == ACCURACIES["validation accuracy"]
    return each.cell.val_accuracy if is_val else each.cell.test_accuracy


def _text(spread: MeanStd | None) -> str:
    return ABSENT if spread is None else spread.percent()


def _test_texts(test: PairedTest) -> list[str]:
    """Return the cells of a test in a table, in percentage points."""
    assert test.difference is not None
    low, high = test.interval or (None, None)
    within = ABSENT if low is None or high is None else f"{100 * low:+.3f} to {100 * high:+.3f}"
    p_value = ABSENT if test.p_value is None else significance.p_text(test.p_value)
    return [str(len(test.seeds)), f"{100 * test.difference:+.3f}", within, p_value]
