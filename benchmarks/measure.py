"""What `make bench` measures: seconds, rates and memory, as numbers.

Speed is measured side by side: in one process, the contenders take turns, an epoch each, and the
medians are compared. On the CPU, with torch's own choice of threads; stacks on a GPU as well, where
there is one.
"""

import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from mnist_exp.data import dataset as data
from mnist_exp.data import sources
from mnist_exp.tracking.store import Store
from mnist_exp.training import loop
from mnist_exp.training.events import Epoch, RunSpec, StackSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant
from mnist_exp.training.stack import Stack

ROUNDS = 5
BATCH = 64
PROCESSES = torch.get_num_threads()  # that train stacks side by side
DEFAULT_STACK = 16  # models in a stack of the seed MLP on a CPU, as the launcher chooses
CPU = torch.device("cpu")
# multiply-adds of a step on one image, forward and for the weights' gradients, and for the
# gradient of every layer's input but the first
FLOPS_AN_IMAGE = 2 * (2 * (784 * 64 + 64 * 32 + 32 * 10) + 64 * 32 + 32 * 10)


GRID = ("optimizer.lr=0.01,0.03,0.1,0.3", "training.batch_size=32,64,128,256")
GRID_JOBS, GRID_EPOCHS = 16, 5


def load_mnist() -> data.Dataset:
    """Return MNIST with all of its 60,000 images for training."""
    return data.load(
        "mnist", root=None, val_size=0, train_size=None, split_seed=0, cache=Path("data")
    )


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a program, without a store that is named in it."""
    return {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | variables


def matmul_rate(device: torch.device = CPU) -> float:
    """Return the floating point operations a second of a 2048 x 2048 float32 matrix product."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    (a @ b)[0, 0].item()
    began = time.perf_counter()
    for _ in range(5):
        c = a @ b
    c[0, 0].item()  # a GPU answers when it is done
    return 5 * 2 * 2048**3 / (time.perf_counter() - began)


def torchvision_batches(root: Path, batch_size: int) -> DataLoader[Any]:
    """Return MNIST's training images as everyone loads them, from files written to a folder."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in sources.EMBEDDED.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    images = datasets.MNIST(str(root), train=True, transform=transforms.Compose(steps))
    return DataLoader(images, batch_size=batch_size, shuffle=True)


def common_loop(root: Path) -> Callable[[], float]:
    """Return the loop that everyone writes, as a function that trains an epoch: its seconds."""
    loader = torchvision_batches(root, BATCH)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> float:
        began = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


def core_loop(dataset: data.Dataset, compiled: bool) -> Callable[[], float]:
    """Return this project's core on the seed recipe, as a function that trains an epoch."""
    stack = Stack(lambda: MLP(dataset.shape, 10), [0], torch.device("cpu"))
    run = RunSpec(0, {"lr": 0.1}, Constant())
    records: Iterator[object] = loop.fit(
        stack, dataset, [run], StackSpec(torch.optim.SGD, 100, BATCH), compiled=compiled
    )

    def epoch() -> float:
        began = time.perf_counter()
        while not isinstance(next(records), Epoch):
            pass
        return time.perf_counter() - began

    return epoch


def ideal_seconds(images: int, rate: float) -> float:
    """Return the seconds that the arithmetic of an epoch takes at a rate of matrix products."""
    return images * FLOPS_AN_IMAGE / rate


@dataclass(frozen=True)
class TrainingTimes:
    """The seconds of epochs of the seed recipe, by contender, and the rate of matrix products."""

    seconds: dict[str, list[float]]
    images: int
    rate: float


def time_training() -> TrainingTimes:
    """Train the seed recipe three ways that take turns; the first is the common loop."""
    dataset = load_mnist()
    with TemporaryDirectory() as folder:
        contenders = {
            "(a) torchvision, DataLoader, nn.Sequential, SGD": common_loop(Path(folder)),
            "(b) this core, compiled (what the seed recipe uses)": core_loop(dataset, True),
            "(b) this core, not compiled (short runs)": core_loop(dataset, False),
        }
        for epoch in contenders.values():
            epoch()  # imports, caches, and the compilation
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        rates = []
        for _ in range(ROUNDS):
            for name, epoch in contenders.items():
                epoch()  # as in training, where one follows another: what it uses is in memory
                seconds[name].append(epoch())
            rates.append(matmul_rate())
    return TrainingTimes(seconds, len(dataset.train), statistics.median(rates))


def time_sweep(folder: Path, name: str, *words: str, **variables: str) -> dict[str, float]:
    """Train the grid as a process, and return its seconds and what it spent them on.

    Args:
        folder: Where its store and its output are.
        name: That of its output in `folder`.
        words: More overrides.
        variables: More of the environment.
    """
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.timed", str(out), "train", "-m", *GRID, *words]
    command += [f"training.epochs={GRID_EPOCHS}", f"hydra.sweep.dir={folder}/{name}"]
    command += [f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    Store(f"sqlite:///{folder}/mlflow.db")
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment(**variables))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **json.loads(out.read_text())}


def stack_epochs(
    dataset: data.Dataset, size: int, device: torch.device, seeds: list[int]
) -> list[float]:
    """Return the seconds of three epochs of a stack, divided by the number of its models."""
    stack = Stack(lambda: MLP(dataset.shape, 10), seeds, device)
    runs = [RunSpec(seed, {"lr": 0.1 * (k + 1) / size}, Constant()) for k, seed in enumerate(seeds)]
    spec = StackSpec(torch.optim.SGD, 4, BATCH)
    records = loop.fit(stack, dataset, runs, spec, compiled=True)
    epochs = [r for r in records if isinstance(r, Epoch)]
    rates = [epoch.metrics[0]["images_per_second"] for epoch in epochs[1:]]
    return [len(dataset.train) / rate / size for rate in rates]


def time_command(words: list[str], times: int = 5) -> float:
    """Return the median seconds from typing a command to its end."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        command = [sys.executable, "-m", "mnist_exp", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@dataclass(frozen=True)
class ProgramUse:
    """The peak bytes of memory of a program, alone and with its children, and its seconds."""

    alone: int
    together: int
    seconds: float


def measure_seed_recipe() -> ProgramUse:
    """Train the seed recipe as a process, and look at its memory 20 times a second."""
    with TemporaryDirectory() as folder:
        words = ["train", "experiments=seed_mlp", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_exp", *words, f"hydra.run.dir={folder}/run"],
            # a cold cache: compiling is part of the peak
            env=environment(TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache"),
            stdout=subprocess.DEVNULL,
        )
        together, alone = 0, 0
        while process.poll() is None:
            sizes = list(_resident(process.pid))
            together, alone = max(together, sum(sizes)), max(alone, *sizes[:1], 0)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the seed recipe failed with status {process.returncode}")
    return ProgramUse(alone, together, seconds)


def _resident(pid: int) -> Iterator[int]:
    """Yield the bytes of resident memory of a process and of its descendants, on Linux."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    yield pages * os.sysconf("SC_PAGE_SIZE")
    for child in children:
        yield from _resident(int(child))


def machine() -> str:
    """Return where and with what it was measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "mlflow"))
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{date.today()}, {os.cpu_count()} cores of {model}, {capability}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}."
    )
