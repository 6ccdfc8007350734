"""The export of a trained model to MLflow's format, while its run records something else."""

import contextlib
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mnist_exp.data.dataset import Dataset
from mnist_exp.errors import RunFailed, first_line
from mnist_exp.system import garbage, signals
from mnist_exp.system.processes import end, fork, receive
from mnist_exp.tracking.mlflow_model import save_model
from mnist_exp.tracking.run_log import RunWriter
from mnist_exp.training.forks import can_fork
from mnist_exp.training.models import DeployedModel


@contextlib.contextmanager
def recording_model(model: DeployedModel, dataset: Dataset, writer: RunWriter) -> Iterator[None]:
    """Record a run's model, which is saved while the block runs, in another process if it can be.

    Args:
        model: The trained model, on the CPU.
        dataset: The data set that it was trained on.
        writer: The writer of the run's journal.

    Raises:
        OSError, RunFailed: At the end of the block, if the model cannot be saved.
    """
    folder = writer.folder / "model"
    if not can_fork():
        yield
        _save(folder, model, dataset)
        writer.model(folder)
        return
    connection, process = fork(_save_in_process, folder, model, dataset)
    try:
        yield
        problem = receive(connection, process)
    finally:
        end([process])
    if isinstance(problem, str):  # it was killed, by what may be to end this process as well
        signals.check()
        raise RunFailed(f"the model could not be saved: {problem}")
    if problem is not None:
        raise problem
    writer.model(folder)


def _save(folder: Path, model: DeployedModel, dataset: Dataset) -> None:
    example = dataset.preview.images[:2].cpu().numpy().astype(np.float32) / 255
    save_model(folder, model, dataset.shape, len(dataset.classes), example)


def _save_in_process(folder: Path, model: DeployedModel, dataset: Dataset) -> Exception | None:
    """Save a model in the process that was forked for it, and return what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which that one ends this one
    torch.set_num_threads(1)  # the threads of OpenMP are missing in a forked process
    garbage.collect_rarely()  # it imports what takes two seconds, and ends
    try:
        _save(folder, model, dataset)
    except OSError as error:
        return error
    except Exception as error:  # it may not survive its way to the other process
        failure = RunFailed(f"the model could not be saved: {first_line(error)}")
        failure.__cause__ = RuntimeError(traceback.format_exc())  # for the log of the run
        return failure
    return None
