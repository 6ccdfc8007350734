"""Python's garbage collector: its thresholds while a program starts, and while it trains."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_exp.system import garbage
from tests.helpers import ROOT, fresh_store

TRAIN = """
import gc, sys
from mnist_exp.cli.main import program
from mnist_exp.run import recorder, train

train_stack, record = train.train_stack, recorder.RunRecorder.record
usual, frozen = gc.get_threshold(), gc.get_freeze_count()
starting, training = [], []

def check_start(*arguments, **named):
    starting.append(gc.get_threshold()[0] > 10 * usual[0])
    return train_stack(*arguments, **named)

def check_training(*arguments):
    training.append(gc.get_threshold() == usual and gc.get_freeze_count() > frozen + 100_000)
    return record(*arguments)

train.train_stack, recorder.RunRecorder.record = check_start, check_training
sys.argv = ["mnist-exp", *sys.argv[1:]]
try:
    program()
finally:
    print("STARTING", starting, "TRAINING", set(training), flush=True)
"""


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    garbage.collect_as_usual()
    before = gc.get_threshold()
    yield
    garbage.collect_as_usual()
    gc.set_threshold(*before)


def test_the_thresholds_are_those_of_before() -> None:
    gc.set_threshold(600, 7, 8)
    garbage.collect_as_usual()  # nothing to end
    assert gc.get_threshold() == (600, 7, 8)
    for _ in range(2):
        garbage.collect_rarely()
    assert gc.get_threshold()[0] > 10_000
    garbage.collect_as_usual()
    assert gc.get_threshold() == (600, 7, 8)


def test_thresholds_are_raised_at_the_start_and_usual_in_training(
    tmp_path: Path,
) -> None:
    words = ["train", "debug=fast", f"tracking.uri={fresh_store(tmp_path)}"]
    words += [f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *words],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "STARTING [True] TRAINING {True}" in done.stdout
