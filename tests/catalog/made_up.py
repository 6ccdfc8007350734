"""Made-up runs and sweeps, recorded as real ones are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mnist_exp.config import paths
from mnist_exp.tracking import waiting
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns, RunWriter, open_runs_at
from mnist_exp.tracking.upload import UploadState

begun: list[RunWriter] = []  # whose journals are to be closed


@pytest.fixture
def open_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenRuns]:
    """The registry of a project whose outputs go to the test's own folder."""
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    yield open_runs_at(tmp_path)
    for writer in begun:
        writer.journal.close()
    begun.clear()


def begin(
    folder: Path,
    open_runs: OpenRuns,
    uri: str,
    *,
    epochs: int = 0,
    asked: int = 10,
    parent: Path | None = None,
    tags: Mapping[str, str] | None = None,
    owner: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
) -> RunWriter:
    """Begin a run and record some epochs; validation is best in the second one."""
    folder.mkdir(parents=True, exist_ok=True)
    name, tags = folder.name, {"output_dir": str(folder), **(tags or {})}
    writer = RunWriter.begin(
        folder, open_runs, name=name, uri=uri, experiment="made up", tags=tags, parent=parent
    )
    begun.append(writer)
    if owner is not None:
        writer.journal.write("resume", owner=dict(owner))
        open_runs.add(RunHistory.of(folder).key, folder, owner)
    writer.params({"training.epochs": asked, "optimizer.lr": 0.1, **(params or {})})
    data = {"name": "tiny", "source": "a test", "digest": "0" * 64}
    writer.dataset({**data, "shape": (1, 2, 2), "sizes": {"train": 3}})
    writer.text("a text", "text.txt")
    for epoch in range(1, epochs + 1):
        accuracy = 0.9 if epoch == 2 else 0.5
        values = {"train/loss": 1 / epoch, "val/accuracy": accuracy, "images_per_second": 100.0}
        writer.metrics(values, epoch)
    return writer


def begin_sweep(
    folder: Path, open_runs: OpenRuns, uri: str, *, jobs: int = 3, **options: Any
) -> RunWriter:
    """Begin the parent run of a sweep of so many jobs."""
    tags = {"sweep": "true", "jobs": str(jobs)}
    return begin(folder, open_runs, uri, tags=tags, **options)


def begin_job(sweep: Path, number: int, open_runs: OpenRuns, uri: str, **options: Any) -> RunWriter:
    """Begin a job of a sweep, in a folder of the sweep's folder."""
    tags = {"job": str(number), "swept": json.dumps({"seed": str(number)})}
    return begin(sweep / str(number), open_runs, uri, parent=sweep, **{"tags": tags, **options})


def run(folder: Path, open_runs: OpenRuns, uri: str, **options: Any) -> None:
    """Record a run from its beginning to its end."""
    begin(folder, open_runs, uri, **{"epochs": 3, **options}).end("FINISHED")


def sweep(folder: Path, open_runs: OpenRuns, uri: str, jobs: int = 3) -> None:
    """Record a sweep from its beginning to its end."""
    parent = begin_sweep(folder, open_runs, uri, jobs=jobs)
    for number in range(jobs):
        begin_job(folder, number, open_runs, uri, epochs=3).end("FINISHED")
    parent.end("FINISHED")


def deliver(open_runs: OpenRuns) -> None:
    """Bring all that waits to its store."""
    assert waiting.deliver(open_runs)[1] == {}


def run_id(folder: Path) -> str:
    """MLflow's id of a run that was delivered."""
    return UploadState.of(folder).run_id


def kept(folder: Path) -> dict[str, bytes]:
    """All files in a folder with their content, but those whose bytes do not matter."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and not path.name.startswith("store.db")
    }
