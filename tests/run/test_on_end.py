"""The command that is run once at the end: what it is told, and that it never harms a run."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mnist_exp
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.run import on_end
from mnist_exp.run.on_end import run_on_end
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.training import loop
from mnist_exp.training.events import Epoch
from tests.faults.delivery import begin

# what it was told, and where it was told that, a line each time
PROGRAM = (
    "import json, os, sys\n"
    "told = {**json.load(sys.stdin), 'at': os.getcwd()}\n"
    "print(json.dumps(told), file=open(sys.argv[1], 'a'))\n"
)


class Heard:
    """A command that writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.file, program = folder / "heard.jsonl", folder / "hear.py"
        program.write_text(PROGRAM)
        self.command = f"{sys.executable} {program} {self.file}"

    @property
    def override(self) -> str:
        return f'tracking.on_end="{self.command}"'

    def all(self) -> list[dict[str, Any]]:
        """What it was told, one after the other."""
        text = self.file.read_text() if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(tmp_path)


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """The folder of a run that this process has ended."""
    writer = begin(tmp_path / "ended", OpenRuns(tmp_path / "open"), "sqlite:///nowhere.db")
    writer.metrics({"train/loss": 0.5, "lr": math.nan}, 1)
    writer.end("FAILED", "diverged")
    return writer.folder


def test_it_is_told_the_result(ended: Path, heard: Heard) -> None:
    run_on_end(heard.command, ended, {"chosen": "lr=0.1"})
    (told,) = heard.all()
    assert len(told.pop("id")) == 32
    assert told == {
        "kind": "run",
        "name": "ended",
        "status": "FAILED",
        "reason": "diverged",
        "folder": str(ended),
        "store": "sqlite:///nowhere.db",
        "metrics": {"train/loss": 0.5, "lr": None},
        "chosen": "lr=0.1",
        "at": os.getcwd(),
    }


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("exit 3", "it ended with status 3"),
        ("no-such-program-at-all", "it ended with status 127"),
        ("kill -9 $$", "it was ended by SIGKILL"),
        ("kill -40 $$", "it was ended by signal 40"),  # which has no name
        ("a\0b", "embedded null byte"),
        ("sleep 60 & wait", "it was ended, as it took more than 0 seconds"),
    ],
)
def test_its_failure_is_a_warning(
    command: str,
    problem: str,
    ended: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(on_end, "SECONDS", 0.3)
    began = time.monotonic()
    run_on_end(command, ended)
    assert time.monotonic() - began < 5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"tracking.on_end={command}: {problem}. The run is not affected"


def test_what_reads_nothing_is_no_failure(ended: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_on_end("true", ended, {"much": "x" * 1_000_000})  # more than a pipe holds
    assert caplog.records == []


def test_what_has_not_ended_or_is_anothers_is_not_told(
    ended: Path, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begin(tmp_path / "open run", OpenRuns(tmp_path / "open"), "sqlite:///nowhere.db")
    run_on_end(heard.command, writer.folder)
    run_on_end(heard.command, tmp_path / "no run")
    run_on_end(None, ended)
    monkeypatch.setattr(on_end, "process_identity", lambda: {"pid": 1})
    run_on_end(heard.command, ended)
    assert heard.all() == []
    writer.journal.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (RunFailed("diverged"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_run(
    error: BaseException | None,
    status: str,
    place: list[str],
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = loop.fit

    def breaks(*arguments: Any, **more: Any) -> Iterator[Any]:
        for record in fit(*arguments, **more):
            yield record
            if error is not None and isinstance(record, Epoch):
                raise error

    monkeypatch.setattr(loop, "fit", breaks)
    words = [*place, heard.override, "training.compile=never"]
    if error is None:
        mnist_exp.train(words)
    else:
        with pytest.raises(type(error)):
            mnist_exp.train(words)
    (told,) = heard.all()
    assert (told["kind"], told["status"], told["at"]) == ("run", status, os.getcwd())
    assert told["metrics"]["train/loss"] > 0
    with pytest.raises(ConfigError, match="holds the record of a run already"):
        mnist_exp.train(words)
    assert len(heard.all()) == 1


def test_a_sweep_and_none_of_its_jobs(place: list[str], heard: Heard, tmp_path: Path) -> None:
    words = [*place[:2], heard.override, "hydra/launcher=basic", "training.compile=never"]
    result = mnist_exp.train_sweep([*words, f"hydra.sweep.dir={tmp_path}/jobs", "seed=0,1"])
    (told,) = heard.all()
    assert (told["kind"], told["id"], told["status"]) == ("sweep", result.run_id, "FINISHED")
    assert told["best_recipe"] == str(result.best) and told["chosen"] == "all seeds"
    assert told["metrics"]["jobs/finished"] == 2


def test_an_empty_command_is_refused(place: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.on_end= : must be a command, or null"):
        mnist_exp.train([*place, "tracking.on_end=' '"])
    assert not (tmp_path / "run").exists()
