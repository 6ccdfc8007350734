"""Training of convolutional networks: this core, plain loops, and a process a core.

`python -m benchmarks.convolutions WORDS` is what is measured in processes of their own: it trains
on one thread whenever a line comes in, and answers with the seconds.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import CPU, environment, load_mnist, matmul_rate, torchvision_batches
from mnist_exp.augmentation.augment import Augmenter
from mnist_exp.config.compose import compose
from mnist_exp.run.job import Job, prepare
from mnist_exp.training import loop
from mnist_exp.training.compile import can_compile
from mnist_exp.training.events import Progress
from mnist_exp.training.seeds import step_keys
from mnist_exp.training.stack import Stack
from mnist_exp.training.step import STEPS_PER_CALL

NETWORKS = {
    "the convolutional network": ["model=cnn"],
    "the network of the record recipe, with augmentation and averaged weights": [
        "experiments=mnist_record"
    ],
}
TRAINING = ["optimizer=nesterov", "training.batch_size=128", "training.device=cpu"]
BATCH, STEPS = 128, loop.STEPS_PER_SYNC  # images in a batch, and batches in a turn
CORE = f"this core, {torch.get_num_threads()} threads"  # a contender's name
ROUNDS = 5  # turns of each contender, after one that is not counted
Contender = Callable[[], float]  # trains for a turn, and returns its seconds
Step = Callable[[Tensor, Tensor], object]  # trains on one batch


@dataclass(frozen=True)
class NetworkTimes:
    """What the contenders have taken to train a network, and its arithmetic."""

    seconds: dict[str, list[float]]  # an epoch and model, extrapolated from each turn
    augmentation: list[float]  # the seconds of it that augmentation takes alone, each turn
    epoch_flops: float
    rate: float  # of matrix products, floating point operations a second


def train_flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Return the floating point operations of a training step on one image.

    Convolutions and linear layers are counted, at three times the forward pass: backward computes
    the gradients of weights and of inputs. The first layer needs none for its input.
    """
    counts: list[int] = []

    def count(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        weight = layer.get_parameter("weight")  # [out, in / groups, ...]
        counts.append(output[0].numel() * weight[0].numel())

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module.eval()(torch.zeros(1, *shape))
    return 2 * (3 * sum(counts) - counts[0])


def core(job: Job) -> Contender:
    """Return this project's core, traced, on a job."""
    stack = Stack(job.build, [job.config.seed], CPU)
    records = loop.fit(stack, load_mnist(), [job.run_spec], job.stack_spec)

    def turn() -> float:
        began = time.perf_counter()
        while not isinstance(next(records), Progress):
            pass
        return time.perf_counter() - began

    return turn


def augmentation(job: Job) -> Contender:
    """Return the augmentation of this core's images alone, of as many as it trains on in a turn."""
    data = load_mnist()
    augmenter = Augmenter(job.stack_spec.augmentation, data, BATCH, CPU)
    images = torch.randperm(len(data.train))[None, : STEPS * BATCH]
    keys = step_keys(job.config.seed, 0, STEPS)[:, None]

    def turn() -> float:
        began = time.perf_counter()
        for indices, its_keys in zip(
            images.split(STEPS_PER_CALL * BATCH, 1), keys.split(STEPS_PER_CALL), strict=True
        ):
            augmenter(data.train.images, data.train.labels, indices, its_keys)
        return time.perf_counter() - began

    return turn


def plain_step(module: nn.Module) -> Step:
    """Return the training step that everyone writes."""
    optimizer = torch.optim.SGD(module.train().parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()

    return step


def common_loop(module: nn.Module, root: Path) -> Contender:
    """Return the loop that everyone writes, on images that torchvision reads one by one."""
    return _turns(plain_step(module), iter(torchvision_batches(root, BATCH)))


def best_loop(module: nn.Module, compiled: bool) -> Contender:
    """Return the fastest plain loop: images as one tensor, in torch's memory layout for speed."""
    module = module.to(memory_format=torch.channels_last)
    if compiled:
        module.compile()
    step = plain_step(module)
    data = load_mnist()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(data.train))
        for chosen in itertools.cycle(order.split(BATCH)[:-1]):
            x = data.normalise(data.train.images[chosen])
            yield x.to(memory_format=torch.channels_last), data.train.labels[chosen]

    return _turns(step, batches())


def _turns(step: Step, batches: Iterator[Sequence[Tensor]]) -> Contender:
    def turn() -> float:
        began = time.perf_counter()
        for x, y in itertools.islice(batches, STEPS):
            step(x, y)
        return time.perf_counter() - began

    return turn


def in_processes(words: Sequence[str], count: int, cleanup: ExitStack) -> Contender:
    """Return this core in as many processes, one thread each: the seconds of the slowest."""
    command = [sys.executable, "-m", "benchmarks.convolutions", *words]
    processes = [
        cleanup.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(OMP_NUM_THREADS="1"),
            )
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdin is not None
        cleanup.callback(process.stdin.close)  # upon which it ends

    def turn() -> float:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in processes if process.stdout]
        return max(map(float, answers))

    return turn


def measure(words: Sequence[str]) -> NetworkTimes:
    """Train the network that overrides describe in several ways, which take turns."""
    job = prepare(compose([*TRAINING, *words]))
    images = len(load_mnist().train)
    count = os.cpu_count() or 1
    with TemporaryDirectory() as folder, ExitStack() as cleanup:
        contenders = {
            "torchvision, DataLoader": common_loop(job.build(), Path(folder)),
            "a plain loop on tensors, channels_last": best_loop(job.build(), False),
            CORE: core(job),
            f"this core, {count} processes of a thread each": in_processes(words, count, cleanup),
        }
        if can_compile(CPU):
            name = "the plain loop on tensors with torch.compile"
            contenders[name] = best_loop(job.build(), True)
        augment = augmentation(job)
        models = {name: count if "processes" in name else 1 for name in contenders}
        for turn in (*contenders.values(), augment):
            turn()  # memory, caches, and the compilation
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        augmenting, rates = [], []
        turns = images / (STEPS * BATCH)  # in an epoch
        for _ in range(ROUNDS):
            for name, turn in contenders.items():
                seconds[name].append(turn() * turns / models[name])
            augmenting.append(augment() * turns)
            rates.append(matmul_rate())
    flops = train_flops(job.build(), load_mnist().shape) * images
    return NetworkTimes(seconds, augmenting, flops, statistics.median(rates))


def main() -> None:
    """Train on one thread, a turn for each line of the standard input."""
    torch.set_num_threads(1)
    turn = core(prepare(compose([*TRAINING, *sys.argv[1:]])))
    for _ in sys.stdin:
        print(turn(), flush=True)


if __name__ == "__main__":
    main()
