"""A small data set, learnable but not at once, made in a moment."""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnist_exp.config.compose import compose
from mnist_exp.config.schema import DatasetConfig
from mnist_exp.data import dataset, sources
from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.data.sources import DATASETS, DatasetSpec
from mnist_exp.run import job
from mnist_exp.run.job import Job
from tests.config.bad_input import Prepare
from tests.faults.server import FaultyServer, Upstream
from tests.helpers import fresh_store, tiny_dataset
from tests.programs import Start, starting

CLASSES = 4


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude from collection what is imported, which lives to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _embedded_mnist_is_read_once() -> Iterator[None]:
    """Have the MNIST in the package unpacked once, not in each run of this process or of its forks.

    That takes half a second, which many runs of a test are shorter than; at once, so that forks
    have it. All tests share the arrays, in which nothing may be written.
    """
    read, embedded = dataset._read, sources.EMBEDDED
    read_embedded = functools.cache(lambda: read("mnist", DATASETS["mnist"], embedded))
    read_embedded()

    def read_once(name: str, spec: DatasetSpec, folder: Path) -> Any:
        is_embedded = name == "mnist" and folder == embedded
        return read_embedded() if is_embedded else read(name, spec, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_read", read_once)
        yield


def _split(patterns: Tensor, count: int, generator: torch.Generator) -> Split:
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 160, (count, 1, *patterns.shape[1:]), generator=generator)
    return Split((patterns[labels][:, None] + noise).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the runs of a module's tests."""
    return tmp_path_factory.mktemp("a module")


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    """The URI of a store of a module's own."""
    return fresh_store(folder)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python with the lines of a program; nothing outlives the test."""
    with starting() as start:
        yield start


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """`make_dataset(train=300, val=0, size=8)`: one faint pattern a class, and noise."""

    def make(train: int = 300, val: int = 0, size: int = 8) -> Dataset:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randint(0, 60, (CLASSES, size, size), generator=generator)
        splits = [_split(patterns, count, generator) for count in (train, val, 50)]
        pixels = splits[0].images / 255
        return Dataset(
            name="synthetic",
            classes=tuple("abcd"),
            shape=(1, size, size),
            train=splits[0],
            val=splits[1] if val else None,
            test=splits[2],
            preview=Split(splits[0].images[:30], splits[0].labels[:30]),
            mean=float(pixels.mean()),
            std=float(pixels.std()),
            digest="",
            source="synthetic",
        )

    return make


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """A real MLflow server, one for all modules of a process, as it takes seconds to start."""
    with Upstream(tmp_path_factory.mktemp("upstream")) as server:
        yield server


@pytest.fixture
def faulty(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """What stands before it and misbehaves, asked once and for a second at most."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with FaultyServer(upstream.uri) as server:
        yield server


@pytest.fixture
def prepare(tmp_path: Path) -> Iterator[Prepare]:
    """`job.prepare` on overrides, with a tiny data set; nothing may have been created at the end.

    `real`: with the data set that is asked for.
    """

    def call(overrides: Sequence[str], real: bool = False) -> Job:
        store = f"tracking.uri=sqlite:///{tmp_path}/store.db"
        composed = compose([store, f"hydra.run.dir={tmp_path}/run", *overrides])

        def small(asked: DatasetConfig) -> Dataset:
            return tiny_dataset(2 * composed.training.batch_size)

        return job.prepare(composed, None if real else small)

    yield call
    assert [path.name for path in tmp_path.iterdir() if path.name in ("store.db", "run")] == []
