"""The benchmarks measure what they say: a name that has moved would be timed in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import convolutions
from benchmarks.first_minute import on_terminal
from mnist_exp.training.models import StridedCNN
from tests.helpers import ROOT, fresh_store


def test_all_kinds_of_work_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "seconds.json"
    overrides = ["optimizer.lr=0.1,0.2", "training.batch_size=32,64", "training.epochs=2"]
    overrides += ["dataset.train_size=320", "training.device=cpu", "training.compile=never"]
    overrides += [f"tracking.uri={fresh_store(tmp_path)}", f"hydra.sweep.dir={tmp_path}/sweep"]
    program = [sys.executable, "-m", "benchmarks.timed", str(out), "train", "-m", *overrides]
    subprocess.run(program, cwd=ROOT, check=True, capture_output=True, timeout=120)
    seconds = json.loads(out.read_text())
    # a method that is not called here, and is found on its class wherever it is called
    assert seconds.pop("compile") == 0
    assert seconds and all(spent > 0 for spent in seconds.values()), seconds
    if sys.platform == "linux" and (os.cpu_count() or 1) > 1:  # where stacks have processes
        assert [*tmp_path.glob("seconds.[0-9]*")], "no forked process was measured"


def test_a_terminal_is_read_as_it_is_written() -> None:
    program = "import sys, time; print('first'); time.sleep(0.5); print(sys.stdin.isatty())"
    session = on_terminal(sys.executable, "-c", program)
    assert session.status == 0
    assert "".join(piece for _, piece in session.output).split() == ["first", "True"]
    assert session.first_line == session.seen("first")
    assert session.first_line + 0.4 < session.seen("True") <= session.seconds
    assert 0 < session.cpu_seconds < session.seconds
    assert on_terminal(sys.executable, "-c", "raise SystemExit(3)").status == 3


def test_the_arithmetic_of_a_network_is_that_of_its_layers() -> None:
    network = StridedCNN((1, 28, 28), 10, width=4, layers=[1, 1])
    first, second = 14 * 14 * 4 * 25, 14 * 14 * 4 * 4 * 9
    third, last = 7 * 7 * 8 * 4 * 9, 7 * 7 * 8 * 10
    expected = 2 * (2 * first + 3 * (second + third + last))
    assert convolutions.train_flops(network, (1, 28, 28)) == expected


def test_a_process_answers_each_line_with_its_seconds() -> None:
    small = ["model=cnn", "model.width=1", "model.layers=[0]", "dataset.train_size=320"]
    program = [sys.executable, "-m", "benchmarks.convolutions", *small]
    ended = subprocess.run(
        program, input="\n\n", cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    seconds = [float(line) for line in ended.stdout.splitlines()]
    assert len(seconds) == 2 and all(0 < spent < 60 for spent in seconds)
