"""What several tests share: tiny data, a store of their own, and the command line as a process."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlflow
import numpy as np
import torch

from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.run.console import Reporter
from mnist_exp.tracking.store import Store
from mnist_exp.training.events import Epoch
from mnist_exp.training.forks import start_autograd

ROOT = Path(__file__).resolve().parents[1]


def tiny_dataset(count: int, size: int = 28, classes: int = 10) -> Dataset:
    """Noise with labels, and no validation split."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % classes)
    names = tuple(map(str, range(classes)))
    info = names, (1, size, size), 0.5, 0.29
    return Dataset(*info, "tiny", split, None, split, split, "0" * 64, "a test")


def write_idx(folder: Path, size: int = 32, classes: int = 26, count: int = 130) -> Path:
    """A folder of four IDX files: noise, with labels that go round the classes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", count), ("t10k", classes)):
        images = rng.integers(0, 256, (n, size, size), np.uint8)
        labels = (np.arange(n) % classes).astype(np.uint8)
        for content, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{part}-{content}-ubyte").write_bytes(header + array.tobytes())
    return folder


@functools.cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow and SQLAlchemy warn of themselves at first use
        import mlflow.pyfunc
        import mlflow.pytorch  # noqa: F401

        start_autograd()  # else forks of the tests could not train after the export
        # imports what each process that is forked to save a model would take two seconds for
        torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),))
        path = Path(folder, "store.db")
        Store(f"sqlite:///{path}")
        return path.read_bytes()


def fresh_store(folder: Path) -> str:
    """The URI of a new store in `folder`. MLflow takes seconds to make one: it is a copy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store.db"
    path.write_bytes(_empty_store())
    return f"sqlite:///{path}"


@contextlib.contextmanager
def config_on_record(
    store: str, run_id: str, folder: Path
) -> Iterator[tuple[bytes, Callable[[bytes], None]]]:
    """What a store holds as a run's config.yaml, and what puts another content in its place; in the
    end it is put back."""
    client = mlflow.MlflowClient(store)
    path = Path(client.download_artifacts(run_id, "config.yaml", str(folder)))
    before = path.read_bytes()

    def put(content: bytes) -> None:
        path.write_bytes(content)
        client.log_artifact(run_id, str(path))

    yield before, put
    put(before)


class Interrupting(Reporter):
    """Ctrl-C, once an epoch is done."""

    def __init__(self, epoch: int) -> None:
        self.last = epoch

    def epoch(self, record: Epoch) -> None:
        if record.epoch == self.last:
            raise KeyboardInterrupt


def start(words: Sequence[str], folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """`python -m mnist_exp WORD ...` in `folder`."""
    unwanted = ("MLFLOW_TRACKING_URI", "HYDRA_FULL_ERROR")
    inherited = {k: v for k, v in os.environ.items() if k not in unwanted}
    environment = {**inherited, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_exp", *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # whatever started the tests may ignore it, as a shell does for its jobs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit status, what it printed, what it complained of."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return process.returncode, out, err


def command(*words: str, folder: Path, **variables: str) -> tuple[int, str, str]:
    return finish(start(words, folder, **variables))
