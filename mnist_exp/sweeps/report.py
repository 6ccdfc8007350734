"""What a sweep's jobs come to: averages over seeds, their ranking, and the choice.

Pure functions of what is known of each job. Accuracies are shares, 0 to 1; epochs count from 1.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from mnist_exp.config.names import short_names
from mnist_exp.formatting import MeanStd, Table, percent

REASON_LENGTH = 100
_PARTS = ("mean", "std", "n")  # of a MeanStd


@dataclass(frozen=True)
class JobResult:
    """The result of one job of a sweep, as far as it is known."""

    number: int  # its place in the sweep, from 0
    values: Mapping[str, str]  # swept key -> value as it was set: {"optimizer.lr": "0.1"}
    status: str  # FINISHED, FAILED, KILLED, RUNNING; INVALID or NOT RUN where there is no run
    reason: str = ""  # why it failed
    run_id: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)  # the newest of each key
    history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # by epoch

    def metric(self, key: str) -> float | None:
        """Return the newest value of a metric; None where there is none that is finite."""
        value = self.metrics.get(key, math.nan)
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Cell:
    """The jobs of a sweep that differ only in `seed`; its numbers are of those that finished."""

    label: str  # what sets it apart from the other cells: "lr=0.1 batch_size=64"
    values: Mapping[str, str]  # as a job's, without the seed
    jobs: tuple[JobResult, ...]

    @property
    def finished(self) -> tuple[JobResult, ...]:
        """The jobs that ran to their end."""
        return tuple(job for job in self.jobs if job.status == "FINISHED")

    @property
    def val_accuracy(self) -> MeanStd | None:
        """The validation accuracy of each job's best epoch; None without a validation split."""
        return self._spread("best/val_accuracy")

    @property
    def test_accuracy(self) -> MeanStd | None:
        """The test accuracy of the jobs that were tested; None where none was."""
        return self._spread("test/accuracy")

    @property
    def test_loss(self) -> MeanStd | None:
        """The test loss of the jobs that were tested; None where none was."""
        return self._spread("test/loss")

    @property
    def best_epoch(self) -> float | None:
        """The median over the seeds of the epoch with the best validation accuracy."""
        epochs = self._finite("best/epoch")
        return statistics.median(epochs) if epochs else None

    def _finite(self, key: str) -> list[float]:
        return [value for job in self.finished if (value := job.metric(key)) is not None]

    def _spread(self, key: str) -> MeanStd | None:
        values = self._finite(key)
        return MeanStd.of(values) if values else None


@dataclass(frozen=True)
class HeatMapData:
    """The validation accuracies over two swept keys that a heat map shows."""

    x_key: str
    y_key: str
    x_values: tuple[float, ...]  # ascending
    y_values: tuple[float, ...]
    mean: np.ndarray  # [y, x]; nan where nothing finished
    std: np.ndarray  # [y, x]; nan where n = 1
    chosen: tuple[int, int] | None  # (row, column)
    over: tuple[str, ...]  # the other swept keys: each entry is the best cell over them


def cells(jobs: Iterable[JobResult]) -> list[Cell]:
    """Return the cells of a sweep, ranked, best first.

    First those with a validation accuracy of every job, by its mean; then those where a job is
    missing or failed, likewise; then those without validation; then those where nothing finished.
    A mean over the seeds that survived is not comparable with one over all of them: where a
    learning rate is so high that two of three seeds diverge, the third may well be the best of
    all. Cells that tie stay in the order of their jobs.
    """
    jobs = sorted(jobs, key=lambda job: job.number)
    names = short_names(_keys(jobs))
    groups: dict[frozenset[tuple[str, str]], list[JobResult]] = {}
    for job in jobs:
        groups.setdefault(frozenset(_without_seed(job).items()), []).append(job)
    found = []
    for members in groups.values():
        values = _without_seed(members[0])
        label = " ".join(f"{names[key]}={value}" for key, value in values.items())
        found.append(Cell(label or "all seeds", values, tuple(members)))
    return sorted(found, key=_rank)


def _rank(cell: Cell) -> tuple[int, float]:
    accuracy = cell.val_accuracy
    if accuracy is None:
        return (2 if cell.finished else 3), 0.0
    return (0 if accuracy.n == len(cell.jobs) else 1), -accuracy.mean


def _without_seed(job: JobResult) -> dict[str, str]:
    return {key: value for key, value in job.values.items() if key != "seed"}


def _keys(of: Iterable[JobResult | Cell]) -> list[str]:
    return list(dict.fromkeys(key for each in of for key in each.values))


def choose(ranked: Sequence[Cell]) -> Cell | None:
    """Return the cell that validation chooses; an incomplete one only where none is complete.

    None where nothing finished, and where several cells have no validation accuracy to compare:
    the test set never chooses.
    """
    if len(ranked) == 1:
        return ranked[0] if ranked[0].finished else None
    return ranked[0] if ranked and ranked[0].val_accuracy else None


def leaderboard(ranked: Sequence[Cell], chosen: Cell | None) -> Table:
    """Return a table of the cells, with test accuracies wherever they were measured."""
    keys = _keys(ranked)
    names = short_names(keys)
    header = ["rank", *(names[key] for key in keys)]
    header += ["validation accuracy", "best epoch", "test accuracy", "not finished"]
    rows = []
    for rank, cell in enumerate(ranked, start=1):
        val, test, epoch = cell.val_accuracy, cell.test_accuracy, cell.best_epoch
        rows.append(
            [
                f"{rank} (chosen)" if cell == chosen else f"{rank}",
                *(cell.values.get(key, "") for key in keys),
                val.percent() if val else "",
                "" if epoch is None else f"{epoch:g}",
                test.percent() if test else "",
                f"{len(cell.jobs) - len(cell.finished)} of {len(cell.jobs)}",
            ]
        )
    return Table(header, rows)


def csv_text(ranked: Sequence[Cell], chosen: Cell | None) -> str:
    """Return the leaderboard for programs: full precision, statuses, run ids, "" for unknown."""
    keys = _keys(ranked)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spreads = [f"{split}_accuracy_{part}" for split in ("val", "test") for part in _PARTS]
    writer.writerow(["rank", "chosen", *keys, *spreads, "best_epoch", "statuses", "run_ids"])
    for rank, cell in enumerate(ranked, start=1):
        numbers = [
            getattr(spread, part, None)
            for spread in (cell.val_accuracy, cell.test_accuracy)
            for part in _PARTS
        ]
        counts = Counter(job.status for job in cell.jobs)
        statuses = "; ".join(f"{status} {count}" for status, count in sorted(counts.items()))
        run_ids = " ".join(job.run_id for job in cell.jobs if job.run_id)
        values = [cell.values.get(key) for key in keys]
        is_chosen = "yes" if cell == chosen else "no"
        writer.writerow([rank, is_chosen, *values, *numbers, cell.best_epoch, statuses, run_ids])
    return text.getvalue()


def job_table(jobs: Sequence[JobResult]) -> Table:
    """Return a table of the jobs: what was set, how each ended and, where it failed, why."""
    jobs = sorted(jobs, key=lambda job: job.number)
    keys = _keys(jobs)
    names = short_names(keys)
    rows = []
    for job in jobs:
        accuracy = job.metric("best/val_accuracy")
        reason = next((line.strip() for line in job.reason.splitlines() if line.strip()), "")
        if len(reason) > REASON_LENGTH:
            reason = reason[: REASON_LENGTH - 1] + "…"
        values = [job.values.get(key, "") for key in keys]
        best = "" if accuracy is None else percent(accuracy)
        rows.append([f"{job.number}", *values, job.status, best, reason])
    header = ["job", *(names[key] for key in keys), "status", "validation accuracy", "reason"]
    return Table(header, rows)


def heat_maps(ranked: Sequence[Cell], chosen: Cell | None) -> list[HeatMapData]:
    """Return heat maps for every two swept keys that have two or more values, all numbers.

    There is none without validation. Each entry is the cell that ranks first among those with its
    two values, incomplete ones where there is no other.
    """
    if not any(cell.val_accuracy for cell in ranked):
        return []
    keys = _keys(ranked)
    axes = {}
    for key in keys:
        numbers = {_number(cell.values.get(key, "")) for cell in ranked}
        finite = sorted(number for number in numbers if number is not None)
        if len(finite) == len(numbers) > 1:
            axes[key] = finite
    found = []
    for x_key, y_key in combinations(axes, 2):
        x_values, y_values = axes[x_key], axes[y_key]
        mean = np.full((len(y_values), len(x_values)), np.nan)  # [y, x]
        std = mean.copy()
        place = None
        for cell in reversed(ranked):  # the best is written last
            column = x_values.index(float(cell.values[x_key]))
            row = y_values.index(float(cell.values[y_key]))
            if accuracy := cell.val_accuracy:
                mean[row, column] = accuracy.mean
                std[row, column] = math.nan if accuracy.std is None else accuracy.std
            if cell == chosen:
                place = row, column
        over = tuple(key for key in keys if key not in (x_key, y_key))
        found.append(
            HeatMapData(x_key, y_key, tuple(x_values), tuple(y_values), mean, std, place, over)
        )
    return found


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
