"""Lists of runs: what is in them, and how they are shown."""

import csv
import io
import json
from datetime import datetime, timedelta

import pytest

from mnist_exp.catalog import fields, listing
from mnist_exp.catalog.listing import list_records
from mnist_exp.catalog.records import Record, best_val_accuracy
from mnist_exp.errors import ConfigError
from tests.catalog.recorded import Recorded

GRID = [{"optimizer.lr": lr, "seed": seed} for lr in (0.1, 0.3) for seed in (0, 1)]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    recorded = Recorded.new(tmp_path_factory.mktemp("listing"))
    recorded.run("old", {"training.patience": 5})
    recorded.sweep("grid", GRID)
    recorded.run("bad", {"training.patience": "None"}, end="FAILED", reason="diverged\nmore of it")
    recorded.run("new", {"training.patience": "None"}, tags={"note": "a note\nof two lines"})
    return recorded.load()


def names(found: listing.Listing) -> list[str]:
    return [record.name for record in found.records]


def test_sweeps_stand_for_their_jobs(known: list[Record]) -> None:
    assert names(list_records(known)) == ["new", "bad", "sweep grid", "old"]
    assert names(list_records(known, unfolded=True)) == [record.name for record in known]
    (sweep,) = [record for record in known if record.kind == "sweep"]
    assert names(list_records(known, sweep.jobs, order="name")) == ["0", "1", "2", "3"]
    assert names(list_records(known, filters=["lr=0.3", "seed=1"])) == ["3"]
    found = list_records(known, limit=2, order="started")
    assert names(found) == ["old", "sweep grid"] and found.total == 4
    with pytest.raises(ConfigError, match="--limit 0: must be 1 or more"):
        list_records(known, limit=0)


def test_table(known: list[Record]) -> None:
    now = datetime.fromtimestamp(known[0].start_time / 1000)
    header, rows = list_records(known).table(now)
    by_name = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_name["sweep grid"]["epochs"] == "4/4 jobs"
    assert by_name["bad"]["status"] == "FAILED: diverged (not in MLflow)"
    assert by_name["bad"]["val"] == "90.00%" and by_name["bad"]["test"] == ""
    assert by_name["new"]["note"] == "a note" and by_name["new"]["epochs"] == "2/2"
    # most have no patience: what is usual is not said
    assert by_name["old"]["differs in"] == "patience=5" and by_name["new"]["differs in"] == ""
    assert by_name["new"]["started"] == f"{now:%H:%M}"
    assert "note" not in list_records(known, filters=["name=old"]).table(now).header
    later = list_records(known).table(now + timedelta(days=400)).rows
    assert later[0][2] == f"{now:%Y-%m-%d}"


def test_what_is_in_a_name_is_no_difference(known: list[Record]) -> None:
    jobs = [record for record in known if record.kind == "job"]
    assert set(listing.differences(jobs).values()) == {""}  # learning rate and seed


def test_json_and_csv_have_all_fields(known: list[Record]) -> None:
    found = list_records(known, unfolded=True)
    plain = json.loads(json.dumps(found.as_json(), allow_nan=False))
    new, bad, sweep = (each for each in plain if each["kind"] != "job" and each["name"] != "old")
    assert (new["epochs"], new["epochs_asked"], new["best_val_accuracy"]) == (2, 2, 0.9)
    assert (new["status"], new["reason"], new["in_mlflow"]) == ("FINISHED", None, False)
    assert new["note"] == "a note\nof two lines" and new["params"]["training.epochs"] == "2"
    assert new["started"].endswith("+00:00") and new["ended"] >= new["started"]
    assert bad["reason"] == "diverged\nmore of it" and bad["test_accuracy"] is None
    assert sweep["jobs"] == {"FINISHED": 4} and sweep["best_val_accuracy"] == 0.8
    rows = list(csv.DictReader(io.StringIO(found.csv_text())))
    assert [row["id"] for row in rows] == [each["id"] for each in plain]
    assert (
        rows[0]["params.training.patience"] == "None"
        and float(rows[0]["metrics.val/accuracy"]) == 0.9
    )
    assert {row["jobs"] for row in rows} == {"", "FINISHED=4"}


def test_the_best_accuracy_of_a_sweep_that_goes_on_is_that_of_its_jobs(recorded: Recorded) -> None:
    writer = recorded.sweep("goes on", GRID, end="")
    (sweep,) = [record for record in recorded.load() if record.kind == "sweep"]
    writer.journal.close()
    assert best_val_accuracy(sweep) == 0.8 + 3 / 100 and sweep.status == "RUNNING"


def test_every_field_can_be_sorted_by(known: list[Record]) -> None:
    for name in fields.names(known):
        assert len(fields.sort(known, name, fields.names(known))) == len(known)


def test_the_best_accuracy_is_not_the_newest(recorded: Recorded) -> None:
    """Of a run that goes on, and of one that was killed, before and after it is delivered."""
    recorded.run("killed", {}, (0.9, 0.5), end="KILLED")
    recorded.run("running", {}, (0.8, 0.0), end="").journal.close()
    for _ in range(2):
        by_name = {record.name: record for record in recorded.load()}
        assert best_val_accuracy(by_name["killed"]) == 0.9
        assert best_val_accuracy(by_name["running"]) == 0.8
        recorded.deliver()
