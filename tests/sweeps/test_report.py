"""What a sweep comes to: averages and ranks by hand, tables, heat maps."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from mnist_exp.formatting import MeanStd
from mnist_exp.sweeps import report
from mnist_exp.sweeps.report import Cell, JobResult


def job(
    number: int,
    values: Mapping[str, str],
    val: float | None = None,
    *,
    status: str = "FINISHED",
    epoch: int | None = None,
    test: float | None = None,
    reason: str = "",
) -> JobResult:
    found = {"best/val_accuracy": val, "best/epoch": epoch, "test/accuracy": test}
    metrics = {key: value for key, value in found.items() if value is not None}
    return JobResult(number, values, status, reason, f"run{number}", metrics)


def seeds(
    first: int, values: Mapping[str, str], *accuracies: float | None, **others: Any
) -> list[JobResult]:
    """One job a seed, numbered from `first`; None for one that failed."""
    return [
        job(first + seed, {**values, "seed": str(seed)}, accuracy,
            status="FAILED" if accuracy is None else "FINISHED", **others)
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def labels(ranked: list[Cell]) -> list[str]:
    return [cell.label for cell in ranked]


def test_a_cell_averages_over_the_seeds() -> None:
    jobs = [
        job(number, {"optimizer.lr": "0.1", "seed": str(number)}, val, epoch=epoch, test=test)
        for number, (val, epoch, test) in enumerate(
            [(0.90, 3, 0.80), (0.92, 9, 0.84), (0.97, 4, 0.88)]
        )
    ]
    (cell,) = report.cells(jobs)
    assert cell.label == "lr=0.1" and cell.values == {"optimizer.lr": "0.1"}
    assert cell.jobs == cell.finished == tuple(jobs)
    # deviations -0.03, -0.01, 0.04: squares add up to 0.0026, over n - 1 = 2
    assert cell.val_accuracy is not None and cell.test_accuracy is not None
    assert astuple(cell.val_accuracy) == pytest.approx((0.93, math.sqrt(0.0013), 3))
    assert astuple(cell.test_accuracy) == pytest.approx((0.84, 0.04, 3))
    assert cell.best_epoch == 4


def test_what_did_not_finish_is_not_averaged() -> None:
    """A killed job may have got to an epoch better than any that the others ended with."""
    values = {"optimizer.lr": "1", "seed": "1"}
    killed = job(1, values, 0.99, status="KILLED", epoch=1, test=0.99)
    (cell,) = report.cells([job(0, {**values, "seed": "0"}, 0.5, epoch=7, test=0.4), killed])
    assert len(cell.finished) == 1 < len(cell.jobs)
    assert cell.val_accuracy == MeanStd(0.5, None, 1)
    assert cell.test_accuracy == MeanStd(0.4, None, 1)
    assert cell.best_epoch == 7


def test_no_result_is_none() -> None:
    (cell,) = report.cells(seeds(0, {}, None, None))
    assert (cell.val_accuracy, cell.test_accuracy, cell.best_epoch) == (None, None, None)
    (cell,) = report.cells([job(0, {}, math.nan)])
    assert cell.finished and cell.val_accuracy is None


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (MeanStd(0.97314, 0.00123, 3), "97.314 % ± 0.123 (3)"),
        (MeanStd(0.97314, None, 1), "97.31 % (1)"),
        (MeanStd(1.0, 0.0, 2), "100.000 % ± 0.000 (2)"),
    ],
)
def test_percent(spread: MeanStd, text: str) -> None:
    assert spread.percent() == text


def test_a_mean_loss_has_a_decimal_more_than_one_loss() -> None:
    assert MeanStd(0.081234, 0.000452, 3).loss() == "0.08123 ± 0.00045 (3)"
    assert MeanStd(0.081234, None, 1).loss() == "0.0812 (1)"


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"optimizer.lr": "0.1", "training.batch_size": "64"}, "lr=0.1 batch_size=64"),
        ({"model": "cnn", "optimizer.lr": "1e-05", "seed": "0"}, "model=cnn lr=1e-05"),
        ({"model.dropout": "0", "other.dropout": "1"}, "model.dropout=0 other.dropout=1"),
        ({"lr": "1", "optimizer.lr": "2"}, "lr=1 optimizer.lr=2"),
        ({"model.seed": "3"}, "model.seed=3"),  # "seed" alone would be the run's own
        ({"model.hidden": "[64,32]"}, "hidden=[64,32]"),
        ({"seed": "4"}, "all seeds"),
        ({}, "all seeds"),
    ],
)
def test_labels(values: dict[str, str], label: str) -> None:
    assert labels(report.cells([job(0, values)])) == [label]


def test_ranks() -> None:
    jobs = [
        *seeds(0, {"lr": "nothing"}, None, None),
        *seeds(2, {"lr": "one seed of two"}, 0.99, None),
        *seeds(4, {"lr": "good"}, 0.92, 0.94),
        *seeds(6, {"lr": "best"}, 0.93, 0.95),
        *seeds(8, {"lr": "one worse seed"}, None, 0.98),
        job(10, {"lr": "no validation", "seed": "0"}, test=1.0),
    ]
    expected = ["best", "good", "one seed of two", "one worse seed", "no validation", "nothing"]
    for order in (jobs, jobs[::-1]):
        ranked = report.cells(order)
        assert labels(ranked) == [f"lr={name}" for name in expected]
        assert all([j.number for j in c.jobs] == sorted(j.number for j in c.jobs) for c in ranked)


def test_ties_stay_in_the_order_of_the_jobs() -> None:
    """Sums of 0.1, 0.2 and 0.3 differ by their order, unless they are exactly rounded."""
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    jobs = seeds(0, {"lr": "a"}, 0.3, 0.2, 0.1) + seeds(3, {"lr": "b"}, 0.1, 0.2, 0.3)
    assert labels(report.cells(jobs)) == labels(report.cells(jobs[::-1])) == ["lr=a", "lr=b"]


def test_a_finished_job_without_its_metric_makes_no_full_average() -> None:
    jobs = seeds(0, {"lr": "half"}, 0.99, math.nan) + seeds(2, {"lr": "full"}, 0.9, 0.9)
    assert labels(report.cells(jobs)) == ["lr=full", "lr=half"]


def test_validation_chooses() -> None:
    complete = seeds(0, {"lr": "complete"}, 0.5, 0.5)
    incomplete = seeds(2, {"lr": "incomplete"}, 0.9, None)
    failed = seeds(4, {"lr": "failed"}, None)
    blind = [job(5, {"lr": "blind", "seed": "0"}, test=0.9)]
    other = [job(6, {"lr": "other", "seed": "0"}, test=0.8)]

    def chosen(*of: list[JobResult]) -> str | None:
        cell = report.choose(report.cells([job for jobs in of for job in jobs]))
        return None if cell is None else cell.label.removeprefix("lr=")

    assert chosen(failed, incomplete, complete) == "complete"
    assert chosen(failed, incomplete) == "incomplete"
    assert chosen(complete, blind) == "complete"
    assert chosen(blind) == "blind"
    assert chosen(blind, other) is None
    assert chosen(blind, failed) is None
    assert chosen(failed) is None
    assert chosen() is None


def grid() -> list[JobResult]:
    """Learning rate by batch size, two seeds; test accuracy of the best only."""
    return [
        *seeds(0, {"optimizer.lr": "1e-1", "training.batch_size": "64"}, 0.96, 0.98, epoch=5,
               test=0.95),
        *seeds(2, {"optimizer.lr": "1e-1", "training.batch_size": "128"}, 0.9, 0.9),
        *seeds(4, {"optimizer.lr": "0.01", "training.batch_size": "64"}, 0.8, None),
        *seeds(6, {"optimizer.lr": "0.01", "training.batch_size": "128"}, None, None),
    ]  # fmt: skip


def test_leaderboard() -> None:
    ranked = report.cells(grid())
    header, rows = report.leaderboard(ranked, report.choose(ranked))
    assert header == ["rank", "lr", "batch_size", "validation accuracy", "best epoch",
                      "test accuracy", "not finished"]  # fmt: skip
    assert rows == [
        ["1 (chosen)", "1e-1", "64", "97.000 % ± 1.414 (2)", "5", "95.000 % ± 0.000 (2)", "0 of 2"],
        ["2", "1e-1", "128", "90.000 % ± 0.000 (2)", "", "", "0 of 2"],
        ["3", "0.01", "64", "80.00 % (1)", "", "", "1 of 2"],
        ["4", "0.01", "128", "", "", "", "2 of 2"],
    ]


def test_leaderboard_shows_every_test_accuracy_there_is() -> None:
    jobs = [job(0, {"lr": "1"}, 0.9, test=0.7), job(1, {"lr": "2"}, 0.8, test=0.75)]
    ranked = report.cells(jobs)
    _, rows = report.leaderboard(ranked, report.choose(ranked))
    assert [(row[0], row[-2]) for row in rows] == [("1 (chosen)", "70.00 % (1)"),
                                                   ("2", "75.00 % (1)")]  # fmt: skip


def test_tables_of_nothing() -> None:
    assert report.cells([]) == []
    assert report.heat_maps([], None) == []
    assert report.leaderboard([], None)[1] == report.job_table([])[1] == []


def test_csv_round_trip() -> None:
    jobs = [
        *seeds(0, {"model": "a,\"b\"", "model.hidden": "[64,32]"}, 1 / 3, 2 / 3, epoch=2, test=0.1),
        *seeds(2, {"model": "mlp", "model.hidden": "1e6"}, 0.1, None),
        *seeds(4, {"model": "mlp", "model.hidden": "2e6"}, None, None),
    ]  # fmt: skip
    ranked = report.cells(jobs)
    text = report.csv_text(ranked, report.choose(ranked))
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    assert len(rows) == 3
    first, second, third = rows
    assert (first["rank"], first["chosen"], second["chosen"]) == ("1", "yes", "no")
    assert (first["model"], first["model.hidden"]) == ('a,"b"', "[64,32]")
    val = ranked[0].val_accuracy
    assert val is not None
    assert float(first["val_accuracy_mean"]) == val.mean == 0.5
    assert float(first["val_accuracy_std"]) == val.std  # every digit
    assert first["val_accuracy_n"] == "2" and float(first["best_epoch"]) == 2
    assert float(first["test_accuracy_mean"]) == 0.1 and first["test_accuracy_n"] == "2"
    assert first["statuses"] == "FINISHED 2" and first["run_ids"] == "run0 run1"
    assert second["val_accuracy_std"] == second["test_accuracy_mean"] == second["best_epoch"] == ""
    assert second["statuses"] == "FAILED 1; FINISHED 1"
    assert third["val_accuracy_mean"] == third["val_accuracy_n"] == ""


def test_outcomes() -> None:
    jobs = [
        job(2, {"lr": "1e9", "seed": "0"}, status="INVALID", reason="\n" + 300 * "x"),
        job(0, {"lr": "0.1", "seed": "0"}, 0.9731),
        job(1, {"lr": "9", "seed": "0"}, status="FAILED", reason="diverged in epoch 2\nin detail"),
    ]
    header, rows = report.job_table(jobs)
    assert header == ["job", "lr", "seed", "status", "validation accuracy", "reason"]
    assert rows[:2] == [
        ["0", "0.1", "0", "FINISHED", "97.31 %", ""],
        ["1", "9", "0", "FAILED", "", "diverged in epoch 2"],
    ]
    assert rows[2][-1] == 99 * "x" + "…"


def test_pair() -> None:
    ranked = report.cells(grid())
    (pair,) = report.heat_maps(ranked, report.choose(ranked))
    assert (pair.x_key, pair.y_key, pair.over) == ("optimizer.lr", "training.batch_size", ())
    assert (pair.x_values, pair.y_values) == ((0.01, 0.1), (64.0, 128.0))
    np.testing.assert_allclose(pair.mean, [[0.8, 0.97], [np.nan, 0.9]])
    np.testing.assert_allclose(pair.std, [[np.nan, math.sqrt(0.0002)], [np.nan, 0]], atol=1e-15)
    assert pair.chosen == (0, 1)


def test_pairs_over_other_keys() -> None:
    """Each entry is the best that any model reached there; 10 comes after 9, and 1e1 is 10."""
    values = [
        ("cnn", "9", "0", 0.7), ("cnn", "10", "0", 0.5), ("cnn", "9", "1", 0.6),
        ("mlp", "9", "0", 0.4), ("mlp", "1e1", "0", 0.8), ("mlp", "1e1", "1", None),
    ]  # fmt: skip
    jobs = [
        job(n, {"model": model, "x": x, "y": y}, val, status="FINISHED" if val else "FAILED")
        for n, (model, x, y, val) in enumerate(values)
    ]
    ranked = report.cells(jobs)
    (pair,) = report.heat_maps(ranked, report.choose(ranked))
    assert pair.x_values == (9, 10) and pair.over == ("model",)
    np.testing.assert_equal(pair.mean, [[0.7, 0.8], [0.6, np.nan]])
    assert np.isnan(pair.std).all()  # one seed
    assert pair.chosen == (0, 1)


def test_a_mean_over_all_seeds_hides_the_survivor_of_another() -> None:
    jobs = [
        *seeds(0, {"model": "a", "x": "1", "y": "1"}, 0.9, 0.9),
        *seeds(2, {"model": "b", "x": "1", "y": "1"}, 0.99, None),
        *seeds(4, {"model": "b", "x": "2", "y": "2"}, 0.7, None),
    ]
    (pair,) = report.heat_maps(report.cells(jobs), None)
    np.testing.assert_allclose(pair.mean, [[0.9, np.nan], [np.nan, 0.7]])
    assert pair.chosen is None


@pytest.mark.parametrize("odd", ["[64,32]", "cnn", "nan", "inf", "", "1"])
def test_no_pair_with_what_is_no_number_or_one_only(odd: str) -> None:
    jobs = [job(n, {"x": str(n), "y": "1" if n else odd}, 0.5) for n in range(2)]
    assert report.heat_maps(report.cells(jobs), None) == []
    three = [
        job(n, {"x": str(n), "y": str(-n), "z": "1" if n else odd}, 0.5) for n in range(2)
    ]  # fmt: skip
    assert [pair.over for pair in report.heat_maps(report.cells(three), None)] == [("z",)]


def test_every_pair_of_three() -> None:
    jobs = [job(n, {"a": str(n), "b": str(n), "c": f"1e{n}"}, 0.5) for n in range(2)]
    found = report.heat_maps(report.cells(jobs), None)
    assert [(p.x_key, p.y_key, p.over) for p in found] == [
        ("a", "b", ("c",)), ("a", "c", ("b",)), ("b", "c", ("a",)),
    ]  # fmt: skip


def test_no_pairs_without_validation() -> None:
    jobs = [job(n, {"a": str(n), "b": str(n)}, test=0.9) for n in range(2)]
    assert report.heat_maps(report.cells(jobs), None) == []
