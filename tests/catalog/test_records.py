"""What is on record: stores and journals together."""

import logging
from dataclasses import replace

import pytest

from mnist_exp.catalog import records
from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError
from tests.catalog.recorded import Recorded

LRS = [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.3}]


def plain(record: Record) -> Record:
    """A record without what tells where it comes from."""
    known = replace(record, highest_val_accuracy=None)  # which only the journal tells at once
    return replace(known, id="", parent="", stored=None, open_run=None, jobs=(), tags={})


def test_a_store_and_journals_say_the_same(recorded: Recorded) -> None:
    recorded.run("alone", {"optimizer.lr": 0.5})
    recorded.run("failed", {}, (0.2,), end="FAILED", reason="diverged: the loss is nan")
    recorded.sweep("lrs", LRS)
    before = recorded.load()
    assert [record.kind for record in before] == ["job", "job", "sweep", "run", "run"]
    recorded.deliver()
    after = recorded.load()
    assert list(map(plain, after)) == list(map(plain, before))
    for delivered, waiting in zip(after, before, strict=True):
        assert delivered.tags.items() >= waiting.tags.items()
        assert waiting.is_waiting and not delivered.is_waiting
        assert delivered.id == (delivered.stored and delivered.stored.id) != waiting.id
    for of_time in (before, after):
        (sweep,) = [record for record in of_time if record.kind == "sweep"]
        assert [job.name for job in sweep.jobs] == ["0", "1"] and sweep.jobs_asked == 2
        assert {job.parent for job in sweep.jobs} == {sweep.id}


def test_a_run_that_goes_on_is_known_by_its_journal(recorded: Recorded) -> None:
    writer = recorded.run("running", {}, (0.5,), end="")
    recorded.deliver()
    writer.metrics({"train/loss": 0.1, "val/accuracy": 0.75}, 2)
    (record,) = recorded.load()
    assert record.status == "RUNNING" and record.is_at_work and record.end_time is None
    assert (record.epochs, record.epochs_asked, record.metrics["val/accuracy"]) == (2, 2, 0.75)
    assert record.stored is not None and record.stored.epochs == 1  # the store is behind
    assert record.seconds(record.start_time / 1000 + 5) == 5
    writer.journal.close()


def test_where_no_server_answers_the_journals_are_shown(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = replace(recorded, uri="http://127.0.0.1:1")
    recorded.run("waits", {})
    with caplog.at_level(logging.WARNING):
        (record,) = recorded.load()
    assert record.name == "waits" and record.is_waiting
    assert "Shown is what waits for it here" in caplog.text
    nowhere = replace(recorded, uri="http://127.0.0.1:2")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:2"):  # not known is not empty
        nowhere.load()


def test_a_record_is_found_by_id_key_and_folder(recorded: Recorded) -> None:
    recorded.run("alone", {})
    recorded.sweep("lrs", LRS)
    recorded.deliver()
    known = recorded.load()
    by_name = {record.name: record for record in known}
    alone, sweep, job = by_name["alone"], by_name["sweep lrs"], by_name["1"]
    assert records.find(known, "last") is sweep
    assert records.find(known, "last", ("run",)) is alone
    for word in (alone.id, alone.id[:12], alone.key[:12], str(alone.folder)):
        assert records.find(known, word) is alone
    for word, kinds, message in (
        ("", (), "is named by last, an id"),
        ("nonsense", (), "there is no such run or sweep. .*the newest: "),
        (job.id, ("run", "sweep"), f"it is a job of sweep {sweep.id[:8]}, and not a run or sweep"),
        (alone.id, ("sweep",), "it is a run, and not a sweep"),
    ):
        with pytest.raises(ConfigError, match=message):
            records.find(known, word, kinds)
    other_kind = replace(job, id=f"{alone.id[:4]}y")
    assert records.find([*known, other_kind], alone.id[:4], ("run",)) is alone
    twin = replace(alone, id=f"{alone.id[:4]}x", name="twin")
    with pytest.raises(ConfigError, match="2 ids begin like this; give more") as error:
        records.find([*known, twin], alone.id[:4])
    assert f"{alone.id}  alone" in str(error.value) and f"{twin.id}  twin" in str(error.value)
    with pytest.raises(ConfigError, match="there is no sweep yet"):
        records.find([alone], "last", ("sweep",))
