"""Processes that are forked to train, from one in which torch was used before."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_exp.training.forks import can_fork
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(not can_fork(), reason="no process is forked here")
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed"
)

# after which forks of a process cannot train, where it comes before any backward pass
EXPORT = """
import torch
layer, rows = torch.nn.Linear(1, 1), torch.zeros(2, 1)
torch.export.export(layer, (rows,))
layer(rows).sum().backward()
"""
TRY = """
from mnist_exp.training.forks import can_train_in_fork
print(can_train_in_fork())
"""
STORE = """
import torch
from pathlib import Path
from tests.helpers import fresh_store
fresh_store(Path())
torch.zeros(1, requires_grad=True).backward()
"""
ONNX = """
import torch
from pathlib import Path
from mnist_exp.catalog import onnx_model
layer, rows = torch.nn.Linear(1, 1), torch.zeros(2, 1)
onnx_model._write(layer, rows, Path("model.onnx"))
layer(rows).sum().backward()
"""


def run_python(text: str, folder: Path) -> str:
    """Run a program in a new process, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forks_cannot_train_once_a_model_was_exported_before_any_training(tmp_path: Path) -> None:
    assert run_python(EXPORT + TRY, tmp_path) == "False\n"


@needs_onnx
def test_forks_can_train_after_an_export_to_onnx(tmp_path: Path) -> None:
    assert run_python(ONNX + TRY, tmp_path) == "True\n"


def test_tests_can_fork_what_trains(tmp_path: Path) -> None:
    assert run_python(STORE + TRY, tmp_path) == "True\n"
