"""What `make bench` measures, and the page it writes.

Speed is measured side by side: in one process, the contenders take turns, an epoch each, and the
medians are compared. On the CPU, with torch's own choice of threads; stacks on a GPU as well, where
there is one.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.page import write_measurements
from mnist_exp.data import dataset as data
from mnist_exp.data import sources
from mnist_exp.tracking.store import Store
from mnist_exp.training import loop as training
from mnist_exp.training.events import Epoch, RunSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant
from mnist_exp.training.stack import Stack

ROUNDS = 5
BATCH = 64
PROCESSES = torch.get_num_threads()  # that train stacks side by side
PICKED = 16  # models in a stack, by the launcher's own choice for the seed MLP on a CPU
CPU = torch.device("cpu")
# multiply-adds of a step on one image, forward and for the weights' gradients, and for the
# gradient of every layer's input but the first
FLOPS_AN_IMAGE = 2 * (2 * (784 * 64 + 64 * 32 + 32 * 10) + 64 * 32 + 32 * 10)


def matmul_rate(device: torch.device = CPU) -> float:
    """Floating point operations a second of a 2048 x 2048 float32 matrix product."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    (a @ b)[0, 0].item()
    began = time.perf_counter()
    for _ in range(5):
        c = a @ b
    c[0, 0].item()  # a GPU answers when it is done
    return 5 * 2 * 2048**3 / (time.perf_counter() - began)


def common_loop(root: Path) -> Callable[[], float]:
    """(a) The loop that everyone writes. Returns a function that trains an epoch: seconds."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in sources.EMBEDDED.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    images = datasets.MNIST(str(root), train=True, transform=transforms.Compose(steps))
    loader = DataLoader(images, batch_size=BATCH, shuffle=True)
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


def core(dataset: data.Dataset, compiled: bool) -> Callable[[], float]:
    """(b) This project's core on the seed recipe."""
    stack = Stack(lambda: MLP(dataset.shape, 10), [0], torch.device("cpu"))
    run = RunSpec(0, {"lr": 0.1}, Constant())
    records: Iterator[object] = training.fit(
        stack, dataset, [run], torch.optim.SGD, epochs=100, batch_size=BATCH, compiled=compiled
    )

    def epoch() -> float:
        began = time.perf_counter()
        while not isinstance(next(records), Epoch):
            pass
        return time.perf_counter() - began

    return epoch


def training_speed() -> tuple[list[str], float]:
    """Seconds an epoch of the seed recipe, three ways, and what share of the machine that is.

    And the seconds of (a) alone.
    """
    dataset = data.load(
        "mnist", root=None, val_size=0, train_size=None, split_seed=0, cache=Path("data")
    )
    with TemporaryDirectory() as folder:
        contenders = {
            "(a) torchvision, DataLoader, nn.Sequential, SGD": common_loop(Path(folder)),
            "(b) this core, compiled (what the seed recipe uses)": core(dataset, compiled=True),
            "(b) this core, not compiled (short runs)": core(dataset, compiled=False),
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
    rate = statistics.median(rates)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    baseline = next(iter(medians.values()))
    ideal = len(dataset.train) * FLOPS_AN_IMAGE / rate
    lines = [
        "## Training: the seed recipe, 60,000 images, batch 64",
        "",
        f"Medians of {ROUNDS} interleaved epochs, each the second of two. Matrix products (2048 x "
        f"2048, float32) run at {rate / 1e9:.0f} GFLOP/s here, at which the recipe's arithmetic "
        f"takes {ideal:.3f} s.",
        "",
        "| | seconds an epoch | min to max | times (a) | share of the matrix rate |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, median in medians.items():
        found = seconds[name]
        lines.append(
            f"| {name} | {median:.3f} | {min(found):.3f} to {max(found):.3f} "
            f"| {baseline / median:.1f} | {ideal / median:.0%} |"
        )
    return lines, baseline


GRID = ("optimizer.lr=0.01,0.03,0.1,0.3", "training.batch_size=32,64,128,256")
GRID_JOBS, GRID_EPOCHS = 16, 5


def sweep_speed(common_epoch: float) -> list[str]:
    """(c) A sweep end to end: stacked, one after another, and as the common loop would take.

    `common_epoch`: seconds of an epoch of (a), at batch 64 and 60,000 images.
    """
    images = 55_000 / 60_000  # the rest is for validation, which the common loop would not pay for
    expected = GRID_JOBS * GRID_EPOCHS * common_epoch * images
    with TemporaryDirectory() as folder:
        cold = _sweep(Path(folder), "cold", TORCHINDUCTOR_CACHE_DIR=f"{folder}/cache")
        warm = [_sweep(Path(folder), f"warm{i}") for i in range(3)]
        basic = _sweep(Path(folder), "basic", "hydra/launcher=basic")
    typical = sorted(warm, key=lambda found: found["seconds"])[1]
    seconds = typical["seconds"]
    rows = [
        ("(a), extrapolated from its epoch", expected),
        ("one after another: hydra/launcher=basic", basic["seconds"]),
        ("stacked, compilation cache cold", cold["seconds"]),
        ("stacked, compilation cache warm (median of 3)", seconds),
    ]
    return [
        "## A sweep: 4 learning rates x 4 batch sizes, 5 epochs each, end to end",
        "",
        f"`mnist-exp train -m {' '.join(GRID)} training.epochs={GRID_EPOCHS}`, as a process: "
        "start, tracking, test and report included, on a store that is there already.",
        "",
        "| (c) | seconds | times faster than (a) | than one after another |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {n} | {s:.1f} | {expected / s:.1f} | {basic['seconds'] / s:.1f} |" for n, s in rows),
        "",
        f"(e) What the stacked sweep, cache warm, spent the {PROCESSES} processors on, for "
        f"{seconds:.1f} s.",
        "",
        "| | processor seconds | share |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {typical[key]:.2f} | {typical[key] / seconds / PROCESSES:.1%} |"
            for name, key in (
                ("MLflow: uploading all 17 records, in the background", "upload"),
                ("MLflow: the chosen run's model, exported and saved", "model"),
                ("MLflow: imported and the store opened, in the background", "store"),
                ("compiling, from the cache", "compile"),
                ("training steps", "steps"),
            )
        ),
    ]


def _sweep(folder: Path, name: str, *words: str, **variables: str) -> dict[str, float]:
    """Seconds of the grid as a process, and what it spent them on."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | variables
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.timed", str(out), "train", "-m", *GRID, *words]
    command += [f"training.epochs={GRID_EPOCHS}", f"hydra.sweep.dir={folder}/{name}"]
    command += [f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    Store(f"sqlite:///{folder}/mlflow.db")
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **json.loads(out.read_text())}


def stack_speed() -> list[str]:
    """(d) Seconds an epoch and model, for stacks of several sizes."""
    dataset = data.load(
        "mnist", root=None, val_size=0, train_size=None, split_seed=0, cache=Path("data")
    )
    devices = [torch.device("cpu")]
    sizes = [1, 4, PICKED, 64]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    lines = ["## (d) Stacks of the seed MLP", ""]
    for device in devices:
        here = dataset.to(device)
        rate = statistics.median(matmul_rate(device) for _ in range(5))
        ideal = len(dataset.train) * FLOPS_AN_IMAGE / rate
        lines += [
            f"On the CPU: batch 64, 60,000 images, compiled; medians of 3 epochs. Matrix "
            f"products run at {rate / 1e9:.0f} GFLOP/s, at which a model's epoch takes "
            f"{ideal:.4f} s. The launcher picks {PICKED} here."
            if device.type == "cpu"
            else f"On {torch.cuda.get_device_name()}, steps captured as CUDA graphs; "
            f"{rate / 1e9:.0f} GFLOP/s, {ideal:.4f} s.",
            "",
            "| models | seconds an epoch and model | min to max | share of the matrix rate "
            "| with data orders of their own |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        for size in sizes if device.type == "cpu" else [*sizes, 256]:
            found = _stack_epochs(here, size, device, [0] * size)
            own = _stack_epochs(here, size, device, list(range(size))) if size > 1 else found
            median = statistics.median(found)
            lines.append(
                f"| {size} | {median:.4f} | {min(found):.4f} to {max(found):.4f} "
                f"| {ideal / median:.0%} | {statistics.median(own):.4f} |"
            )
        lines.append("")
    return lines[:-1]


def _stack_epochs(
    dataset: data.Dataset, size: int, device: torch.device, seeds: list[int]
) -> list[float]:
    """Seconds of three epochs of a stack, by the number of its models."""
    stack = Stack(lambda: MLP(dataset.shape, 10), seeds, device)
    runs = [RunSpec(seed, {"lr": 0.1 * (k + 1) / size}, Constant()) for k, seed in enumerate(seeds)]
    records = training.fit(
        stack, dataset, runs, torch.optim.SGD, epochs=4, batch_size=BATCH, compiled=True
    )
    epochs = [r for r in records if isinstance(r, Epoch)]
    rates = [epoch.metrics[0]["images_per_second"] for epoch in epochs[1:]]
    return [len(dataset.train) / rate / size for rate in rates]


def start_up() -> list[str]:
    """Seconds from typing a command to its end."""
    lines = ["## Start-up", "", "| command | seconds, median of 5 |", "| --- | ---: |"]
    for words in (["--help"], ["train", "--cfg", "job"]):
        found = []
        for _ in range(5):
            began = time.perf_counter()
            command = [sys.executable, "-m", "mnist_exp", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(time.perf_counter() - began)
        lines.append(f"| mnist-exp {' '.join(words)} | {statistics.median(found):.2f} |")
    return lines


def memory() -> list[str]:
    """Peak memory of the seed recipe as a process, its children (a compiler) included."""
    with TemporaryDirectory() as folder:
        words = [
            "train",
            "experiments=seed_mlp",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"hydra.run.dir={folder}/run",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        # a cold cache: compiling is part of the peak
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_exp", *words],
            env=environment,
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
    return [
        "## Memory and time of the whole seed recipe",
        "",
        "`mnist-exp train experiments=seed_mlp`, 100 epochs, fresh store, compilation cache cold.",
        "",
        "| | |",
        "| --- | ---: |",
        f"| peak memory of the process | {alone / 1e9:.2f} GB |",
        f"| peak memory with its children (the C++ compiler) | {together / 1e9:.2f} GB |",
        f"| seconds, process start to end | {seconds:.0f} |",
    ]


def _resident(pid: int) -> Iterator[int]:
    """Bytes of resident memory of a process and, after it, of its descendants (Linux)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    yield pages * os.sysconf("SC_PAGE_SIZE")
    for child in children:
        yield from _resident(int(child))


def machine() -> list[str]:
    """Where and with what it was measured."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "mlflow"))
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        f"{date.today()}, {os.cpu_count()} cores of {model}, {capability}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    asked = parser.parse_args()
    lines = ["# Results", "", "Written by `make bench`.", "", *machine(), ""]
    print("\n".join(lines), flush=True)
    first, common_epoch = training_speed()

    def parts() -> Iterator[list[str]]:
        yield first
        yield sweep_speed(common_epoch)
        yield stack_speed()
        yield start_up()
        yield memory()

    for part in parts():
        print("\n".join([*part, ""]), flush=True)
        lines += [*part, ""]
    if asked.output is not None:
        write_measurements(asked.output, "\n".join(lines))


if __name__ == "__main__":
    main()
