"""Records on their way to MLflow, with and without a server that fails."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np

from mnist_exp.tracking import journal, waiting
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns, RunWriter
from mnist_exp.tracking.uploader import Uploader
from tests.faults.server import FaultyServer, Mode

EPOCHS = 6
MODES: tuple[Mode, ...] = ("refuse", "hang", "503", "drop")
MOMENTS = ("start", "middle", "end")


def begin(folder: Path, open_runs: OpenRuns, uri: str, parent: Path | None = None) -> RunWriter:
    folder.mkdir(parents=True, exist_ok=True)
    return RunWriter.begin(
        folder,
        open_runs,
        name=folder.name,
        uri=uri,
        experiment="delivery",
        tags={"who": "a test"},
        parent=parent,
    )


def first_part(writer: RunWriter) -> None:
    writer.params({f"key{i}": i for i in range(130)})
    description = {"name": "tiny", "source": "a test", "digest": "0" * 64}
    writer.dataset({**description, "shape": (1, 2, 2), "sizes": {"train": 3}})
    writer.text("a text", "text.txt")
    writer.image("train/first", np.zeros((4, 8, 3), np.uint8), 0)


def epoch(writer: RunWriter, number: int) -> None:
    writer.metrics({"train/loss": 1 / number, "val/loss": 2 / number}, number)


def last_part(writer: RunWriter) -> None:
    writer.tags({"late": "yes"})
    writer.end("FINISHED")


def whole(folder: Path, open_runs: OpenRuns, uri: str) -> None:
    """The record of a run from its beginning to its end."""
    writer = begin(folder, open_runs, uri)
    first_part(writer)
    for number in range(1, EPOCHS + 1):
        epoch(writer, number)
    last_part(writer)


def faults_in(folder: Path, uri: str) -> list[str]:
    """What MLflow has lost, doubled or changed of a record. Each begins with one of those words."""
    return list(_faults_in(folder, uri))


def _faults_in(folder: Path, uri: str) -> Iterator[str]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("delivery")
    key = RunHistory.of(folder).key
    runs = client.search_runs([experiment.experiment_id], f"tags.run_key = '{key}'")
    if len(runs) != 1:
        yield f"{'doubled' if runs else 'lost'}: {len(runs)} runs"
        return
    (run,) = runs
    entries = journal.read(folder)[0]
    ends = run.info.status, run.info.start_time, run.info.end_time
    end = [entry for entry in entries if entry.kind == "end"][-1]
    if ends != ("FINISHED", entries[0].time, end.time):
        yield f"lost: the run's end, {ends}"
    params = {k: v for k, v in run.data.params.items() if k.startswith("key")}
    if params != {f"key{i}": str(i) for i in range(130)}:
        yield f"lost: params, {params}"
    if (run.data.tags.get("late"), run.data.tags.get("who")) != ("yes", "a test"):
        yield f"lost: tags, {run.data.tags}"
    for name in ("train/loss", "val/loss"):
        points = client.get_metric_history(run.info.run_id, name)
        found = [(m.step, m.value, m.timestamp) for m in points]
        told = [
            (e.fields["step"], e.fields["values"][name], e.time)
            for e in entries
            if e.kind == "metrics"
        ]
        if found != told:
            kind = "differing" if len(found) == len(told) else "lost"
            yield f"{'doubled' if len(found) > len(told) else kind}: {name}, {found} for {told}"
    files = [f.path for f in client.list_artifacts(run.info.run_id)]
    images = client.list_artifacts(run.info.run_id, "images")
    for what, count, wanted in (
        ("files", len(files), 2),  # text.txt, images/
        ("images", len(images), 2),  # one, and its thumbnail
        ("datasets", len(run.inputs.dataset_inputs), 1),
    ):
        if count != wanted:
            yield f"{'lost' if count < wanted else 'doubled'}: {count} {what}"


def recorded_through(
    mode: Mode, moment: str, server: FaultyServer, open_runs: OpenRuns, folder: Path
) -> None:
    """A record, made while the server fails from a moment on, and brought there by `sync`."""
    said: list[str] = []
    with Uploader() as uploader:
        uploader.open(server.uri, open_runs, said.append)
        uploader.watch([folder])
        if moment == "start":
            server.mode = mode
        began = time.monotonic()
        writer = begin(folder, open_runs, server.uri)
        first_part(writer)
        for number in range(1, EPOCHS + 1):
            if number == EPOCHS // 2 and moment == "middle":
                server.mode = mode
            epoch(writer, number)
        if moment == "end":
            uploader.flush(20)
            server.mode = mode
        last_part(writer)
        if moment != "end":
            assert time.monotonic() - began < 2
        time.sleep(0.3)
        assert uploader.close(0.5) == [folder]
    assert any("does not take the record" in text for text in said) or mode == "hang"
    assert [entry.folder for entry in open_runs.entries()] == [folder]
    server.mode = "ok"
    for _ in range(2):  # a second time changes nothing
        answer = waiting.deliver(open_runs)
        assert answer[1] == {}, answer
    assert open_runs.entries() == []


def eight_writers(place: Path, uri: str) -> list[str]:
    """Eight processes record a run each to one fresh store, at once and cold. What went wrong."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(place, uri, n)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    found = [f"lost: writer {n}" for n, writer in enumerate(writers) if writer.exitcode != 0]
    for number in range(8):
        found += faults_in(place / f"run{number}", uri)
    stray = mlflow.MlflowClient(uri).search_runs(["0"])
    return found + [f"differing: {run.info.run_name} is in Default" for run in stray]


def _write(place: Path, uri: str, number: int) -> None:
    open_runs, folder = OpenRuns(place / "open"), place / f"run{number}"
    with Uploader() as uploader:
        uploader.open(uri, open_runs, lambda text: None)
        uploader.watch([folder])
        writer = begin(folder, open_runs, uri)
        first_part(writer)
        for n in range(1, EPOCHS + 1):
            epoch(writer, n)
            time.sleep(0.01)
        last_part(writer)
        assert uploader.close(100) == []
