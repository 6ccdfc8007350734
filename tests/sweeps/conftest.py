"""Sweeps that tests of several files look at, each run once."""

import functools
import logging
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnist_exp.data import dataset as data
from mnist_exp.figures import samples, style
from mnist_exp.run import recorder as record
from tests.helpers import write_idx
from tests.sweeps.helpers import SMALL, Done, train_all


@pytest.fixture(scope="package", autouse=True)
def traces() -> Iterator[None]:
    """Commands in this process leave handlers and a number of threads behind: all are put back.

    What takes long and is read in the tests of single runs is left out: their pictures are blank,
    and no model is exported.
    """
    handlers, threads = logging.root.handlers[:], torch.get_num_threads()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "recording_model", lambda *arguments: nullcontext())
        figures = [
            (samples, "first_layer"),
            (samples, "sample_grid"),
            (samples, "confusion_matrix"),
            (record, "learning_curves"),
        ]
        for module, name in figures:
            patch.setattr(module, name, lambda *arguments, **more: None)
        patch.setattr(style, "pixels", functools.partial(_pixels, style.pixels))
        patch.setattr(style, "save", functools.partial(_save, style.save))
        patch.setattr(data, "load", functools.cache(data.load))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers


def _pixels(real: Any, figure: Any) -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8) if figure is None else real(figure)


def _save(real: Any, figure: Any, path: Path) -> None:
    if figure is None:
        path.write_bytes(b"")
    else:
        real(figure, path)


@pytest.fixture(scope="package")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two learning rates, two momenta, two seeds: four cells, one stack."""
    words = ["optimizer=momentum", "optimizer.lr=0.02,0.1", "optimizer.momentum=0,0.9", "seed=0,3"]
    return train_all(tmp_path_factory.mktemp("a grid"), *SMALL, *words)


@pytest.fixture(scope="package")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What a stack carries besides; Adam, and dropout."""
    words = ["optimizer=adam", "optimizer.lr=0.01", "model.dropout=0.2"]
    words += ["training.label_smoothing=0,0.2", "schedule=constant,cosine"]
    return train_all(tmp_path_factory.mktemp("mixed"), *SMALL, *words)


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for noise that is read in a moment."""
    root = write_idx(tmp_path_factory.mktemp("idx") / "images", size=8, classes=5, count=600)
    return ["dataset=idx", f"dataset.root='{root}'", "dataset.val_size=100", "training.device=cpu"]
