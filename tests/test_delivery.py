"""From journals to MLflow: nothing is lost, nothing is doubled, whatever the server does."""

import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from faulty_server import FaultyServer, Upstream
from helpers import fresh_store

from mnist_exp import courier, journal, tracking
from mnist_exp.courier import Courier
from mnist_exp.journal import Index, Journal
from mnist_exp.tracker import Beginning, DatasetFacts, Story, Tracker, bury_the_dead
from mnist_exp.tracking import Delivered, Store, deliver

EPOCHS = 6


@pytest.fixture
def server(faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    monkeypatch.setattr(courier, "PAUSE", 0.05)
    return faulty


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index")


def begin(folder: Path, index: Index, uri: str, parent: Path | None = None) -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    kind = "sweep" if folder.name == "sweep" else "run"
    beginning = Beginning(folder.name, uri, "delivery", {"who": "a test"}, parent, kind)
    return Tracker(folder, index, beginning)


def first_part(tracker: Tracker) -> None:
    tracker.params({f"key{i}": i for i in range(130)})
    tracker.dataset(DatasetFacts("tiny", "a test", "0" * 64, (1, 2, 2), {"train": 3}))
    tracker.text("a text", "text.txt")
    tracker.image("train/first", np.zeros((4, 8, 3), np.uint8), 0)


def epoch(tracker: Tracker, number: int) -> None:
    tracker.metrics({"train/loss": 1 / number, "val/loss": 2 / number}, number)


def last_part(tracker: Tracker) -> None:
    tracker.tags({"late": "yes"})
    tracker.end("FINISHED")


def whole(folder: Path, index: Index, uri: str) -> None:
    """The record of a run from its beginning to its end."""
    tracker = begin(folder, index, uri)
    first_part(tracker)
    for number in range(1, EPOCHS + 1):
        epoch(tracker, number)
    last_part(tracker)


def check(folder: Path, uri: str) -> None:
    """All of it is there, once."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("delivery")
    key = Story.of(folder).key
    (run,) = client.search_runs([experiment.experiment_id], f"tags.run_key = '{key}'")
    assert run.info.status == "FINISHED"
    entries = journal.read(folder)[0]
    assert run.info.start_time == entries[0].time and run.info.end_time == entries[-1].time
    assert {k: v for k, v in run.data.params.items() if k.startswith("key")} == {
        f"key{i}": str(i) for i in range(130)
    }
    assert run.data.tags["late"] == "yes" and run.data.tags["who"] == "a test"
    points = [e for e in entries if e.kind == "metrics"]
    for name in ("train/loss", "val/loss"):
        found = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value, m.timestamp) for m in found] == [
            (p.fields["step"], p.fields["values"][name], p.time) for p in points
        ]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"text.txt", "images"}
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    assert len(run.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("mode", ["refuse", "hang", "503", "drop"])
@pytest.mark.parametrize("when", ["start", "middle", "end"])
def test_a_server_that_fails(
    mode: str, when: str, server: FaultyServer, upstream: Upstream, index: Index, tmp_path: Path
) -> None:
    """Neither stops nor slows who records; what it has not taken is brought by `sync`."""
    said: list[str] = []
    thread = Courier(server.uri, index, said.append)
    folder = tmp_path / "run"
    thread.watch([folder])
    thread.start()
    if when == "start":
        server.mode = mode
    began = time.monotonic()
    tracker = begin(folder, index, server.uri)
    first_part(tracker)
    for number in range(1, EPOCHS + 1):
        if number == EPOCHS // 2 and when == "middle":
            server.mode = mode
        epoch(tracker, number)
    if when == "end":
        thread.flush(20)
        server.mode = mode
    last_part(tracker)
    if when != "end":
        assert time.monotonic() - began < 2
    time.sleep(0.3)
    undelivered = thread.close(0.5)
    if undelivered:
        assert any("does not take the record" in text for text in said) or mode == "hang"
        assert [entry.folder for entry in index.entries()] == [folder]
    thread.join(10)  # it is in the middle of a call
    server.mode = "ok"
    for _ in range(2):  # a second time changes nothing
        assert courier.sync(index)[1] == {}
    assert index.entries() == []
    check(folder, upstream.uri)


def test_it_comes_back(
    server: FaultyServer, upstream: Upstream, index: Index, tmp_path: Path
) -> None:
    said: list[str] = []
    thread = Courier(server.uri, index, said.append)
    thread.watch([tmp_path / "run"])
    server.mode = "refuse"
    thread.start()
    tracker = begin(tmp_path / "run", index, server.uri)
    first_part(tracker)
    for number in range(1, EPOCHS + 1):
        epoch(tracker, number)
        time.sleep(0.05)
    server.mode = "ok"
    last_part(tracker)
    assert thread.close(20) == []
    assert ["does not take" in said[0], "answers again" in said[-1]] == [True, True]
    assert len(said) == 2  # once each
    check(tmp_path / "run", upstream.uri)


def test_any_answer_may_be_lost(
    server: FaultyServer, upstream: Upstream, index: Index, tmp_path: Path
) -> None:
    """Each call in turn is committed, and its answer dropped: the next try finds it."""
    folder = tmp_path / "run"
    whole(folder, index, server.uri)
    faults = 0
    store = Store(server.uri)
    while index.entries():
        server.requests.clear()
        server.fail("drop", after=faults % 3, kind="POST")
        try:
            deliver(folder, index, store)
        except Exception:
            faults += 1
        server.mode = "ok"
        assert faults < 60
        if faults % 4 == 3:
            deliver(folder, index, store)
    assert faults >= 3
    check(folder, upstream.uri)


def test_delivered_at_every_line(index: Index, tmp_path: Path) -> None:
    """A courier that is killed after any entry, before it has noted that, delivers it again."""
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    tracker = begin(folder, index, store.uri)
    first_part(tracker)
    deliver(folder, index, store)
    told = Delivered.of(folder)
    for number in range(1, EPOCHS + 1):
        epoch(tracker, number)
        deliver(folder, index, store)
        told.save(folder)  # as it was before
    last_part(tracker)
    Delivered(store.uri, creating=True).save(folder)  # and nothing is known but that it was made
    deliver(folder, index, store)
    check(folder, store.uri)


def test_jobs_wait_for_their_sweep(index: Index, tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    parent = begin(tmp_path / "sweep", index, store.uri)
    child = begin(tmp_path / "sweep" / "0", index, store.uri, parent=tmp_path / "sweep")
    with pytest.raises(tracking.NotYet):
        deliver(child.folder, index, store)
    child.end("FINISHED")
    parent.end("FINISHED")
    assert courier.sync(index) == (2, {})
    runs = {folder.name: Delivered.of(folder).run_id for folder in (parent.folder, child.folder)}
    tags = store.get(runs["0"]).data.tags
    assert tags["mlflow.parentRunId"] == runs["sweep"]


def test_a_damaged_line_is_passed_over(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    whole(folder, index, store.uri)
    path = folder / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    (at,) = [i for i, line in enumerate(lines) if b'"step": 3, "values": {"train' in line]
    lines[at] = lines[at].replace(b"0.333", b"0.334")
    path.write_bytes(b"".join(lines))
    deliver(folder, index, store)
    assert "damaged" in caplog.text and str(path) in caplog.text
    run_id = Delivered.of(folder).run_id
    steps = [m.step for m in store.client.get_metric_history(run_id, "train/loss")]
    assert steps == [1, 2, 4, 5, 6]
    assert store.get(run_id).info.status == "FINISHED" and index.entries() == []


def test_eight_writers_on_one_fresh_store(tmp_path: Path) -> None:
    """At once and cold: every point, no lock error, nothing in Default."""
    import multiprocessing

    uri = f"sqlite:///{tmp_path / 'fresh.db'}"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(tmp_path, uri, n)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * 8
    for number in range(8):
        check(tmp_path / f"run{number}", uri)
    client = mlflow.MlflowClient(uri)
    assert client.search_runs(["0"]) == []


def _writer(place: Path, uri: str, number: int) -> None:
    index, folder = Index(place / "index"), place / f"run{number}"
    thread = Courier(uri, index, lambda text: None)
    thread.watch([folder])
    thread.start()
    tracker = begin(folder, index, uri)
    first_part(tracker)
    for n in range(1, EPOCHS + 1):
        epoch(tracker, n)
        time.sleep(0.01)
    last_part(tracker)
    assert thread.close(100) == []


def test_the_dead_are_buried_once_and_delivered(index: Index, tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    tracker = begin(folder, index, store.uri)
    epoch(tracker, 1)
    tracker.journal.close()
    dead = {**journal.owner(), "born": "long ago"}
    lines = journal.read(folder)[0]
    (folder / journal.NAME).unlink()
    with Journal(folder) as again:  # as a process that is no more has written it
        for entry in lines:
            fields = entry.fields | ({"owner": dead} if entry.kind == "begin" else {})
            again.write(entry.kind, **fields)
    index.add(lines[0].fields["key"], folder, dead, "run")
    buried: list[Any] = []
    threads = [
        threading.Thread(target=lambda: buried.extend(bury_the_dead(index))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buried) == 1
    assert courier.sync(index) == (1, {})
    run = store.get(Delivered.of(folder).run_id)
    assert run.info.status == "KILLED" and "without a word" in run.data.tags["reason"]
    assert index.entries() == []
