"""How a run ends, and what is refused before it begins."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run

import mnist_exp
from mnist_exp.config import paths
from mnist_exp.errors import ConfigError
from mnist_exp.system import files
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.training import loop
from mnist_exp.training.events import Epoch
from mnist_exp.training.stack import Stack
from tests.helpers import ROOT, fresh_store


def only_run(place: list[str]) -> Run:
    client = mlflow.MlflowClient(place[1].removeprefix("tracking.uri="))
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return run


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (RuntimeError("out of luck"), "FAILED", "RuntimeError: out of luck"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_exception_in_training(
    error: BaseException,
    status: str,
    reason: str,
    place: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = loop.fit

    def breaks(*arguments: Any, **more: Any) -> Iterator[Any]:
        for record in fit(*arguments, **more):
            yield record
            if isinstance(record, Epoch):
                raise error

    monkeypatch.setattr(loop, "fit", breaks)
    with pytest.raises(type(error)):
        mnist_exp.train(place)
    run = only_run(place)
    assert (run.info.status, run.data.tags["reason"]) == (status, reason)
    assert run.info.end_time
    assert run.data.metrics["train/loss"] > 0  # what was measured is kept
    assert "MLFLOW_TRACKING_URI" not in os.environ  # else the next run would take this store


def test_an_average_of_the_weights_is_kept_in_their_place(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = loop.fit
    average: dict[str, torch.Tensor] = {}
    newest: dict[str, torch.Tensor] = {}

    def watched(stack: Stack, *arguments: Any, **more: Any) -> Iterator[Any]:
        for event in fit(stack, *arguments, **more):
            if isinstance(event, Epoch) and event.improved[0]:
                average.update(event.stack.snapshot())
                newest.update(stack.snapshot())
            yield event

    monkeypatch.setattr(loop, "fit", watched)
    result = mnist_exp.train([*place, "training.ema=1", "model=linear"])
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
    deployed = result.model.state_dict()
    for name, tensor in average.items():
        assert torch.equal(saved[name], tensor[0]) and torch.equal(
            deployed[f"model.{name}"], tensor[0]
        )
        assert not torch.equal(newest[name], tensor)


def test_the_environment_decides_the_store(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fresh_store(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    monkeypatch.setattr(loop, "fit", lambda *a, **k: exec("raise RuntimeError"))
    with pytest.raises(RuntimeError):
        mnist_exp.train(place)
    assert only_run([place[0], f"tracking.uri={other}"]).info.status == "FAILED"
    with pytest.raises(ValueError, match="not enough values"):
        only_run(place)
    assert os.environ["MLFLOW_TRACKING_URI"] == other


def test_deleted_experiment_is_refused(place: list[str], tmp_path: Path) -> None:
    client = mlflow.MlflowClient(place[1].removeprefix("tracking.uri="))
    experiment = client.create_experiment("gone")
    client.delete_experiment(experiment)
    with pytest.raises(ConfigError, match=f"tracking.experiment=gone.*restore -x {experiment}"):
        mnist_exp.train([*place, "tracking.experiment=gone"])
    assert client.search_runs(["0", experiment]) == []
    assert not (tmp_path / "run").exists()


def test_store_of_another_version_leaves_no_folder(place: list[str], tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of the future'")
    with pytest.raises(ConfigError, match=r"tracking\.uri=.*cannot be opened"):
        mnist_exp.train(place)
    assert not (tmp_path / "run").exists()


def test_output_folder_that_cannot_be_made(place: list[str], tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "file")
    (tmp_path / "store.db").unlink()
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=FOLDER"):
        mnist_exp.train([*place, f"hydra.run.dir={tmp_path}/file/run"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the project's outputs, which is the test's own."""
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path / "root")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.mark.parametrize("words", [[], ["seed=0,1", "hydra.sweep.dir={}/sweep"]])
def test_a_registry_that_cannot_be_written_is_refused(
    words: list[str], place: list[str], root: Path, tmp_path: Path
) -> None:
    """As in a checkout on a file system that is read-only."""
    shutil.copy(ROOT / "pyproject.toml", root / "outputs")
    before = sorted(tmp_path.iterdir())
    words = [word.format(tmp_path) for word in words]
    with pytest.raises(ConfigError, match=f"{root}/outputs/.open: the registry .* pip"):
        (mnist_exp.train_sweep if words else mnist_exp.train)([*place, *words])
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_in_a_folder_that_became_read_only_is_not_resumed(
    place: list[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fit", lambda *a, **k: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        mnist_exp.train(place)
    before = (tmp_path / "run" / journal.NAME).read_bytes()
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def check(folder: Path) -> None:
        if folder == tmp_path / "run":
            raise refused

    monkeypatch.setattr(files, "check_writable_folder", check)
    with pytest.raises(ConfigError, match=r"Read-only file system.* Make it writable, and go on"):
        mnist_exp.resume(str(tmp_path / "run"))
    assert (tmp_path / "run" / journal.NAME).read_bytes() == before
