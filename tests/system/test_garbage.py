"""How often Python looks for garbage."""

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
from mnist_exp.cli.main import main
from mnist_exp.run import recorder

first, usual, found = recorder.RunRecorder.start, gc.get_threshold(), []

def start(*arguments):
    found.append(gc.get_threshold() > usual)
    first(*arguments)

def record(self, event):
    found.append(gc.get_threshold() == usual and gc.get_freeze_count() > 0)

recorder.RunRecorder.start, recorder.RunRecorder.record = start, record
try:
    main(sys.argv[1:])
finally:
    assert found and all(found), found
"""


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    garbage.collect_as_usual()
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


def test_a_program_starts_with_few_looks_and_trains_with_the_usual_ones(tmp_path: Path) -> None:
    words = ["train", "debug=fast", f"tracking.uri={fresh_store(tmp_path)}"]
    words += [f"hydra.run.dir={tmp_path}/run"]
    subprocess.run([sys.executable, "-c", TRAIN, *words], cwd=ROOT, check=True)
