"""Processes that are forked to train, from one in which torch was used before."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist_exp.training.forks import can_train_in_fork

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, so no forks")
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed"
)

# what costs a process its forks, where it comes before any backward pass
EXPORT = """
import torch
layer, rows = torch.nn.Linear(1, 1), torch.zeros(2, 1)
torch.export.export(layer, (rows,))
layer(rows).sum().backward()
"""
SWEEP = """
import mnist_exp
words = ["debug=fast", "optimizer.lr=0.1,0.2", "training.batch_size=32,64", "training.device=cpu"]
result = mnist_exp.train_sweep([*words, "training.threads=1"], verbose=True)
print([job.status for job in result.report.jobs])
"""
ONNX = """
import torch
from pathlib import Path
from mnist_exp.catalog import onnx_model
from mnist_exp.training.forks import can_train_in_fork
layer, rows = torch.nn.Linear(1, 1), torch.zeros(2, 1)
onnx_model._write(layer, rows, Path("model.onnx"))
layer(rows).sum().backward()
print(can_train_in_fork())
"""


def run_python(text: str, folder: Path) -> str:
    """Run a program in a new process, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sweep_is_trained_in_one_process_where_its_forks_could_not(tmp_path: Path) -> None:
    printed = run_python(EXPORT + SWEEP, tmp_path)
    assert "one process trains all stacks" in printed
    assert "is not traced" not in printed
    assert printed.splitlines()[-1] == str(["FINISHED"] * 4)


@needs_onnx
def test_an_export_to_onnx_costs_no_fork(tmp_path: Path) -> None:
    assert run_python(ONNX, tmp_path).splitlines()[-1] == "True"


def test_tests_can_fork_what_trains() -> None:
    assert can_train_in_fork()
