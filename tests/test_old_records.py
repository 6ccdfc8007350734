"""Records of before 0.1.0, with which a person goes on today: resume, evaluate, predict, ..."""

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities import Run
from PIL import Image, ImageDraw

from mnist_exp.cli import main as cli
from mnist_exp.config import paths
from mnist_exp.tracking import checkpoint
from tests.helpers import fresh_store
from tests.old_records import unpack

NOBODY = "http://127.0.0.1:9"  # the store of the run whose record has not reached MLflow
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the records, in which the commands that follow are typed."""
    fresh_store(tmp_path)  # MLflow and SQLAlchemy warn of themselves at first use
    folder = tmp_path / "checkout"
    folder.mkdir()
    unpack(folder, socket.gethostname(), {NOBODY: f"sqlite:///{folder}/mlflow.db"})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(paths, "output_root", lambda: folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # for the model in my_net.py
    monkeypatch.delitem(sys.modules, "my_net", raising=False)  # of another test
    return folder


@pytest.fixture
def typed(old: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """What a command came to: its exit status, what it printed, what it complained of."""

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def run_in(folder: Path) -> Run:
    """The run in MLflow that has its output in a folder."""
    run_id = json.loads((folder / ".delivery.json").read_text())["run_id"]
    return client(folder).get_run(run_id)


def client(folder: Path) -> mlflow.MlflowClient:
    root = next(parent for parent in folder.parents if (parent / "mlflow.db").exists())
    return mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")


def losses(folder: Path) -> dict[int, float]:
    points = client(folder).get_metric_history(run_in(folder).info.run_id, "train/loss")
    return {point.step: point.value for point in points}


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    """A one, in ink on paper."""
    image = Image.new("L", (200, 200), 230)
    ImageDraw.Draw(image).line([(100, 40), (100, 160)], fill=20, width=18)
    path = tmp_path / "one.png"
    image.save(path)
    return path


@pytest.mark.parametrize("name", ["finished", "pickled"])
def test_a_finished_run(old: Path, typed: Command, digit: Path, name: str) -> None:
    run = run_in(old / "outputs" / name)
    run_id = run.info.run_id
    status, out, err = typed("evaluate", run_id)
    assert status == 0, err
    share = r"test/accuracy +([\d.]+%)  \(recorded ([\d.]+%)\)"
    found = re.search(share, out)
    assert found and found[1] == found[2] == f"{run.data.metrics['test/accuracy']:.2%}"

    status, out, err = typed("predict", run_id, str(digit), "--json")
    assert status == 0, err
    (prediction,) = json.loads(out)
    assert prediction["class"] in "0123456789" and len(prediction["next"]) == 2

    status, out, err = typed("reproduce", run_id, "--threads", "1")
    assert status == 0, out + err
    assert re.search("^(identical|within tolerance)", out, re.MULTILINE)

    status, out, err = typed("resume", run_id)
    assert status == 0, err
    assert "it is finished; there is nothing to go on with" in out


@pytest.mark.parametrize("name", ["finished", "pickled"])
def test_the_model_in_mlflow(old: Path, name: str) -> None:
    run = run_in(old / "outputs" / name)
    mlflow.set_tracking_uri(f"sqlite:///{old}/mlflow.db")
    try:
        model: Any = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # else the next test would take this store
    with torch.no_grad():
        logits = model(torch.from_numpy(np.zeros((2, 1, 28, 28), np.float32)))
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()


def test_a_finished_sweep(old: Path, typed: Command, tmp_path: Path) -> None:
    folder = old / "outputs" / "sweeps" / "finished"
    before = (folder / "leaderboard.csv").read_text()
    sweep = run_in(folder).info.run_id
    status, out, err = typed("report", sweep, "--output", str(tmp_path / "report"))
    assert status == 0, err
    assert (tmp_path / "report" / "leaderboard.csv").read_text() == before
    assert "chosen on validation" in out

    status, out, err = typed("evaluate", sweep, "--ensemble")
    assert status == 0, err
    assert "together" in out and "adds" in out

    job = run_in(folder / "0")
    assert job.data.tags["mlflow.parentRunId"] == sweep
    status, out, err = typed("evaluate", job.info.run_id)
    assert status == 0, err

    status, out, err = typed("resume", sweep)
    assert status == 0, err
    assert "it is finished; there is nothing to go on with" in out

    status, out, err = typed("train", f"experiments={folder}/best.yaml", "training.epochs=1")
    assert status == 0, err


def test_a_killed_run(old: Path, typed: Command) -> None:
    folder, whole = old / "outputs" / "killed", old / "outputs" / "finished"
    assert run_in(folder).info.status == "RUNNING"
    before = losses(folder)
    status, _, err = typed("resume", run_in(folder).info.run_id)
    assert status == 0, err
    assert f"the run in {folder} is KILLED" in err
    assert run_in(folder).info.status == "FINISHED"
    after = losses(folder)
    assert before.items() <= after.items() and set(after) == {1, 2, 3}
    # the same numbers as of one that nothing happened to, on another machine to rounding
    assert after == pytest.approx(losses(whole), rel=1e-4)
    models = [checkpoint.load(f / "checkpoint.pt")["model"] for f in (folder, whole)]
    for one, other in zip(*(model.values() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert typed("evaluate", run_in(folder).info.run_id)[0] == 0


def test_a_killed_sweep(old: Path, typed: Command) -> None:
    folder = old / "outputs" / "sweeps" / "killed"
    jobs = [folder / str(number) for number in range(4)]
    before = [losses(job) if job.exists() else {} for job in jobs]
    assert before[0] and not before[1]  # one stack had begun, and the other had not
    status, out, err = typed("resume", str(folder))
    assert status == 0, out + err
    assert "0 of 4 jobs finished; 4 to run" in out
    for job, recorded in zip(jobs, before, strict=True):
        assert run_in(job).info.status == "FINISHED"
        assert recorded.items() <= losses(job).items() and set(losses(job)) == {1, 2, 3}
    sweep = run_in(folder)
    assert sweep.info.status == "FINISHED" and sweep.data.metrics["jobs/finished"] == 4
    status, out, err = typed("report", sweep.info.run_id)
    assert status == 0, err


def test_a_record_that_has_not_reached_mlflow(old: Path, typed: Command, digit: Path) -> None:
    folder = old / "outputs" / "waiting"
    status, out, err = typed("sync")
    assert status == 0, err
    assert "waiting runs delivered" in out
    run = run_in(folder)
    assert run.info.status == "FINISHED" and set(losses(folder)) == {1, 2}
    assert typed("evaluate", run.info.run_id)[0] == 0
    status, out, err = typed("predict", run.info.run_id, str(digit))
    assert status == 0, err
    assert not any((old / "outputs" / ".open").glob("*.json"))
