"""Runs and cells beside each other: what differs, what is tested, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mnist_exp import api
from mnist_exp.catalog import compare as comparing
from mnist_exp.catalog.cells import find_cell
from mnist_exp.catalog.compare import compare
from mnist_exp.catalog.compare_cells import CellComparison
from mnist_exp.catalog.compare_runs import RunComparison
from mnist_exp.catalog.listing import list_records
from mnist_exp.catalog.records import Record
from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import defaults_of_old, leaves, task_config
from mnist_exp.errors import ConfigError
from mnist_exp.figures.curves import HUES, cell_colours
from mnist_exp.figures.style import GREEN, ORANGE
from mnist_exp.formatting import wilson
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.sweeps.manifest import Manifest, SweepJob
from mnist_exp.tracking.kept_files import DIFF
from tests.catalog.recorded import Recorded

CLEAN = {"mlflow.source.git.commit": "a" * 40, "git_dirty": "false", "device": "cpu"}
DIRTY = {**CLEAN, "git_dirty": "true"}
SIZES = {"train": 900, "val": 100, "test": 1000}
DATA = {"name": "x", "source": "x", "digest": "d" * 64, "shape": [1, 8, 8], "sizes": SIZES}
GRID = [
    {"optimizer.lr": lr, "training.batch_size": size, "seed": seed}
    for lr in (0.1, 0.3)
    for size in (32, 64)
    for seed in (0, 1, 2)
]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the output folders: of what evaluations have kept, too."""
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    return tmp_path


@pytest.fixture(params=["waiting", "delivered"])
def records(recorded: Recorded, request: pytest.FixtureRequest) -> list[Record]:
    """Three runs and a sweep, which MLflow has, or has not got yet."""
    for name, lr, best, tags in (("a", 0.1, 0.9, CLEAN), ("b", 0.3, 0.8, DIRTY)):
        params = {"seed": 0, "optimizer.lr": lr}
        writer = recorded.run(name, params, (0.5, best), tags=tags, end="")
        writer.dataset(DATA)
        ends = {"best/val_accuracy": best, "best/epoch": 2, "test/accuracy": best - 0.01}
        writer.metrics(ends, 2)
        writer.end("FINISHED")
    recorded.run("c", {"seed": 0, "optimizer.lr": 0.1}, (0.5, 0.9), tags=CLEAN)
    recorded.sweep("grid", GRID)
    if request.param == "delivered":
        recorded.deliver()
    return recorded.load()


def ids(records: list[Record], *names: str) -> list[str]:
    by_name = {record.name: record.id for record in records}
    return [by_name[name] for name in names]


def runs(records: list[Record], *names: str) -> RunComparison:
    found = compare(records, ids(records, *names))
    assert isinstance(found, RunComparison)
    return found


def cells(records: list[Record], *words: str) -> CellComparison:
    (sweep,) = ids(records, "sweep grid")
    found = compare(records, [f"{sweep}{word}" for word in words])
    assert isinstance(found, CellComparison)
    return found


def test_only_what_differs_between_runs_is_there(records: list[Record]) -> None:
    found = runs(records, "a", "b")
    differences = {each.name: list(each.values) for each in found.differences}
    assert differences == {
        "optimizer.lr": ["0.1", "0.3"],
        "uncommitted changes": ["none", "yes (no diff on record)"],
    }
    assert found.not_recorded == []
    metrics = {row.name: row for row in found.metrics}
    assert metrics["val/accuracy"].values == [0.9, 0.8]
    assert metrics["val/accuracy"].intervals == [wilson(90, 100), wilson(80, 100)]
    assert metrics["test/accuracy"].intervals == [wilson(890, 1000), wilson(790, 1000)]
    assert metrics["train/loss"].intervals == [None, None]
    assert "images_per_second" not in metrics  # the same in both


def test_curves_part_at_the_first_epoch_beyond_rounding(records: list[Record]) -> None:
    (parting,) = runs(records, "a", "b").partings
    assert (parting.epochs, parting.epoch) == (2, 2)
    assert parting.values == pytest.approx((0.1, 0.2))


def test_runs_that_are_the_same_say_so(records: list[Record]) -> None:
    found = runs(records, "c", "a")
    assert {each.name for each in found.differences} == {
        *("data", "test images", "train images", "val images")
    }
    assert found.partings[0].epoch is None and found.partings[0].epochs == 2
    assert [row.name for row in found.metrics] == ["test/accuracy", "best/val_accuracy"]
    text = "\n".join(found.lines())
    assert "train/loss is the same to within 0.01% in all 2 epochs that both have" in text
    assert "no interval where the number of test images is not on record" in text
    again = compare(
        [replace(found.records[0], id="x"), found.records[0]], ["x", found.records[0].id]
    )
    assert again.differences == [] and again.not_recorded == ["data"]
    assert again.lines()[0] == "config, code, machine, data and status are the same"


def test_a_run_of_before_a_key_has_what_it_stands_for(recorded: Recorded) -> None:
    config = task_config(compose([]))
    later = dict(defaults_of_old())
    recorded.run("old", {key: v for key, v in leaves(config) if key not in later})
    recorded.run("new", dict(leaves(config)))
    recorded.run("other", {**dict(leaves(config)), "training.precision": "bfloat16"})
    records = recorded.load()
    assert runs(records, "old", "new").differences == []
    (found,) = runs(records, "old", "other").differences
    assert (found.name, list(found.values)) == ("training.precision", ["float32", "bfloat16"])
    listed = list_records(records, filters=["training.precision=float32"]).records
    assert {record.name for record in listed} == {"old", "new"}


def test_uncommitted_changes_are_told_apart_by_their_diff(recorded: Recorded) -> None:
    for name, text in (("a", "+1"), ("b", "+2"), ("c", "+2")):
        writer = recorded.run(name, {}, tags=DIRTY, end="")
        writer.text(text, DIFF)
        writer.end("FINISHED")
    recorded.deliver()
    here = recorded.load()
    elsewhere = [replace(record, folder=None) for record in here]  # the store alone has them
    for records in (here, elsewhere):
        (difference,) = runs(records, "a", "b").differences
        assert difference.name == "uncommitted changes" and len({*difference.values}) == 2
        assert all(re.fullmatch(r"yes \(SHA-256 \w{12}\)", str(v)) for v in difference.values)
        assert runs(records, "b", "c").differences == []


def keep(record: Record, predicted: list[int], digest: str = "d" * 64) -> None:
    KeptPredictions(record.id, digest, ["x", "y"], [0, 0, 0, 1, 1], predicted).save()


def test_kept_predictions_of_the_same_images_are_tested(records: list[Record]) -> None:
    found = runs(records, "a", "b")
    a, b = found.records
    assert found.to_evaluate == [a.id, b.id]
    keep(a, [0, 0, 0, 1, 1])
    assert runs(records, "a", "b").to_evaluate == [b.id]
    keep(b, [0, 1, 1, 1, 1])
    (test,) = runs(records, "a", "b").predictions
    assert test.result is not None and test.images == 5
    assert (test.result.only_first, test.result.only_other, test.result.p_value) == (2, 0, 0.5)
    (change,) = test.classes  # of y, both have all
    assert (change.name, change.images, change.only_first, change.only_other) == ("x", 3, 2, 0)
    assert (change.first_right, change.other_right) == (3, 1)
    keep(b, [0, 0, 0, 1, 1])
    (test,) = runs(records, "a", "b").predictions
    assert test.result is not None and test.result.p_value is None and not test.classes


def test_evaluations_on_other_data_are_not_mixed(records: list[Record]) -> None:
    a, b = runs(records, "a", "b").records
    keep(a, [0, 0, 0, 1, 1])
    keep(b, [0, 1, 1, 1, 1], digest="e" * 64)
    (test,) = runs(records, "a", "b").predictions
    assert test.result is None and test.problem == "they were evaluated on other test images"


def test_a_run_that_was_not_tested_cannot_be_evaluated(recorded: Recorded) -> None:
    recorded.run("a", {})
    recorded.run("failed", {}, end="FAILED", reason="diverged")
    found = runs(recorded.load(), "a", "failed")
    failed = found.records[1]
    assert found.to_evaluate == []
    assert f"as {failed.id[:8]} has not been tested" in found.predictions[0].problem
    assert ("status", ["FINISHED", "FAILED"]) in [(d.name, d.values) for d in found.differences]


def test_more_than_two_are_compared_with_the_first(records: list[Record]) -> None:
    found = runs(records, "a", "b", "c")
    assert [parting.epoch for parting in found.partings] == [2, None]
    _, table = found.tables()[0]
    assert table.header[1:] == [record.id[:8] for record in found.records]
    assert ["optimizer.lr", "0.1", "0.3", "0.1"] in table.rows


def test_cells_have_means_and_tests_over_their_seeds(records: list[Record]) -> None:
    """The accuracy of job n is 0.8 + n / 100: the last cell is the best, by 0.03 a cell."""
    found = cells(records, "", ":2", ":lr=0.1,batch_size=32")
    assert [each.cell.label for each in found.cells] == [
        *("lr=0.3 batch_size=64", "lr=0.3 batch_size=32", "lr=0.1 batch_size=32")
    ]
    assert [(each.rank, each.is_chosen) for each in found.cells] == [
        *((1, True), (2, False), (4, False))
    ]
    differences = {each.name: list(each.values) for each in found.differences}
    assert differences == {
        "optimizer.lr": ["0.3", "0.3", "0.1"],
        "training.batch_size": ["64", "32", "32"],
    }
    _, table = found.tables()[1]
    assert table.rows[0][1] == "90.000 % ± 1.000 (3)"
    test = found.tests[0]["best/val_accuracy"]
    assert list(test.seeds) == ["0", "1", "2"] and test.difference == pytest.approx(-0.03)
    assert test.p_value is None and "the same for every seed" in test.reason


def test_cells_of_uneven_seeds_are_tested_over_the_common_ones(recorded: Recorded) -> None:
    values = [{"optimizer.lr": lr, "seed": seed} for seed in (0, 1, 2) for lr in (0.1, 0.3)]
    recorded.sweep("grid", values[:5])
    found = cells(recorded.load(), ":lr=0.3", ":lr=0.1")
    test = found.tests[0]["test/accuracy"]
    assert list(test.seeds) == ["0", "1"] and test.difference == pytest.approx(-0.01)


def test_cells_whose_jobs_were_never_run_are_there(recorded: Recorded) -> None:
    """The list of jobs in the sweep's folder tells of them."""
    writer = recorded.sweep("grid", GRID[:4])
    jobs = [
        SweepJob(number, [], {key: str(value) for key, value in values.items()}, folder=Path("x"))
        for number, values in enumerate(GRID)
    ]
    Manifest("basic", {}, jobs).save(writer.folder)
    recorded.deliver()
    found = cells(recorded.load(), ":1", ":lr=0.1,batch_size=64", ":lr=0.3,batch_size=64")
    assert [line.split("  ", 2)[2] for line in found.titles()] == [
        *("3 FINISHED", "1 FINISHED, 2 NOT RUN", "3 NOT RUN")
    ]
    text = "\n".join(found.lines())
    assert ": 2 jobs did not finish, and the means are over the others" in text
    differences = {each.name: list(each.values) for each in found.differences}
    assert differences["seed"] == ["0,1,2", "0", None]
    assert found.tests[1]["best/val_accuracy"].reason == "they do not both have one"
    assert found.draw().axes[0].get_title(loc="left") == "validation accuracy"


def test_a_job_that_was_deleted_since_counts_no_more(recorded: Recorded) -> None:
    writer = recorded.sweep("grid", GRID[:3])
    jobs = [
        SweepJob(number, [], {key: str(value) for key, value in values.items()}, folder=Path("x"))
        for number, values in enumerate(GRID[:3])
    ]
    Manifest("basic", {}, jobs, ended={n: ("FINISHED", "") for n in range(3)}).save(writer.folder)
    recorded.run("other", {})
    known = recorded.load()
    (sweep,) = [record for record in known if record.kind == "sweep"]
    cell = find_cell(replace(sweep, jobs=sweep.jobs[1:]), "")
    assert list(cell.by_seed("test/accuracy")) == ["1", "2"]


def test_a_cell_is_named_by_rank_or_values(records: list[Record]) -> None:
    for word in (":3", ":lr=0.1,batch_size=64", ":optimizer.lr=0.10 batch_size=64.0"):
        assert cells(records, "", word).cells[1].rank == 3
    (sweep,) = [record for record in records if record.kind == "sweep"]
    found = compare(records, [f"{sweep.folder}:1", f"{sweep.folder}:2"])
    assert isinstance(found, CellComparison) and [each.rank for each in found.cells] == [1, 2]


def test_the_cell_that_the_sweep_has_chosen_is_meant(records: list[Record]) -> None:
    tags = {"chosen": "lr=0.1 batch_size=64"}
    records = [
        replace(record, tags={**record.tags, **tags}) if record.kind == "sweep" else record
        for record in records
    ]
    found = cells(records, "", ":1")
    assert [(each.rank, each.is_chosen) for each in found.cells] == [(3, True), (1, False)]


def test_what_cannot_be_compared_is_refused(records: list[Record]) -> None:
    a, b, sweep = ids(records, "a", "b", "sweep grid")
    listed = "\n  1  lr=0.3 batch_size=64\n  2  lr=0.3 batch_size=32"
    for words, message in (
        ([], "nothing is named, and two or more are compared"),
        ([a], f"{a} alone is named"),
        ([a, b, a[:20]], f"{a[:20]}: it is the same as {a}. Name another"),
        ([sweep, f"{sweep}:1"], f"{sweep}:1: it is the same as {sweep}"),
        ([a, sweep], f"{a[:8]} is a run and {sweep[:8]} a sweep"),
        ([sweep, a], f"{a[:8]} is a run and {sweep[:8]} a sweep"),
        ([sweep, f"{a}:1"], "it is a run, and not a sweep"),
        ([sweep, f"{sweep}:5"], ":5: its ranks are 1 to 4"),
        ([sweep, f"{sweep}:0"], ":0: its ranks are 1 to 4"),
        ([sweep, f"{sweep}:lr=7"], f"no cell has these values.*{listed}"),
        ([sweep, f"{sweep}:lr=0.3"], f"2 cells have these values.*{listed}$"),
        ([sweep, f"{sweep}:lrr=1"], f"names no cell. Did you mean lr.*(lr, batch_size):{listed}"),
        ([sweep, f"{sweep}:nonsense"], "nonsense names no cell"),
    ):
        with pytest.raises(ConfigError) as error:
            compare(records, words)
        pattern = ".*".join(map(re.escape, message.split(".*"))).replace(r"\$", "$")
        assert re.search(pattern, str(error.value), re.DOTALL), error.value


def test_a_sweep_that_has_chosen_nothing_has_to_be_told_a_cell(recorded: Recorded) -> None:
    recorded.sweep("empty", [])
    recorded.sweep("grid", GRID)
    records = [
        replace(record, metrics={}) if record.kind == "job" else record
        for record in recorded.load()
    ]
    jobs = [record for record in records if record.kind == "job"]
    records = [replace(r, jobs=jobs) if r.name == "sweep grid" else r for r in records]
    grid, empty = ids(records, "sweep grid", "sweep empty")
    with pytest.raises(ConfigError, match="validation has chosen no cell of this sweep"):
        compare(records, [grid, f"{grid}:2"])
    with pytest.raises(ConfigError, match="the sweep has no job on record yet"):
        compare(records, [empty, grid])


def test_json_has_the_documented_names(records: list[Record]) -> None:
    a, _ = runs(records, "a", "b").records
    keep(a, [0, 0, 0, 1, 1])
    of_runs = json.loads(json.dumps(runs(records, "a", "b").as_json(), allow_nan=False))
    of_cells = json.loads(json.dumps(cells(records, ":1", ":2").as_json(), allow_nan=False))
    text = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")
    documented = {*re.findall(r"\w+", text.split("## compare")[1].split("\n## ")[0])}

    def names(node: Any) -> set[str]:
        if isinstance(node, list):
            return {name for each in node for name in names(each)}
        if not isinstance(node, dict):
            return set()
        own = {key for key in node if key.isidentifier()}
        inner = [value for key, value in node.items() if key not in ("values", "jobs")]
        return own.union(*map(names, inner))

    for found in (of_runs, of_cells):
        assert names(found) <= documented, names(found) - documented
    assert (of_runs["kind"], of_cells["kind"]) == ("runs", "cells")
    assert list(of_runs) == [
        *("kind", "columns", "differences", "not_recorded", "metrics", "curves", "predictions")
    ]


def test_numbers_that_json_has_no_word_for_are_null(recorded: Recorded) -> None:
    recorded.run("a", {}, (0.5, float("nan")))
    recorded.run("b", {}, (0.5, 0.9))
    plain = runs(recorded.load(), "a", "b").as_json()
    text = json.dumps(plain, allow_nan=False)
    (curve,) = json.loads(text)["curves"]
    assert curve["epoch"] == 2 and curve["values"] == [None, pytest.approx(0.1)]


def test_cells_of_a_sweep_have_the_colours_of_its_report(records: list[Record]) -> None:
    figure = cells(records, ":3", ":1").draw()
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == [GREEN, ORANGE]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("validation accuracy", "training loss")
    ]
    of_runs = runs(records, "a", "b").draw()
    assert [line.get_color() for line in of_runs.axes[0].lines] == [*HUES[:2]]


def test_a_grey_cell_of_the_report_gets_no_colour_of_another_cell(recorded: Recorded) -> None:
    recorded.sweep("grid", [{"optimizer.lr": lr, "seed": 0} for lr in range(1, 13)])
    found = cells(recorded.load(), ":1", ":12")
    first = found.cells[0]
    others = {*cell_colours(first.ranking, first.chosen).values()} - {ORANGE}
    chosen, grey = (line.get_color() for line in found.draw().axes[0].lines)
    assert chosen == ORANGE and grey in HUES and grey not in others | {ORANGE}


def test_comparing_runs_imports_nothing_heavy(recorded: Recorded) -> None:
    recorded.run("a", {"seed": 0})
    recorded.run("b", {"seed": 1})
    recorded.deliver()
    a, b = ids(recorded.load(), "a", "b")
    program = (
        "import sys, mnist_exp\n"
        f"mnist_exp.compare([{a!r}, {b!r}], ['tracking.uri={recorded.uri}']).tables()\n"
        "heavy = {'torch', 'mlflow', 'scipy', 'pandas', 'matplotlib', 'hydra', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_the_python_function_refuses_a_text(recorded: Recorded) -> None:
    with pytest.raises(ConfigError, match="words: must be a list"):
        api.compare("last", [f"tracking.uri={recorded.uri}"])
    assert comparing.compare is compare
