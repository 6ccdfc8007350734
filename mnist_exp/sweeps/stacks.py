"""Which jobs of a sweep share a stack, and how many models and processes are fastest."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from mnist_exp.config.schema import TrainingConfig, leaves
from mnist_exp.formatting import count_of, is_number
from mnist_exp.run.console import Reporter
from mnist_exp.run.job import Job
from mnist_exp.run.recorder import THREADS
from mnist_exp.run.train import should_compile
from mnist_exp.sweeps.manifest import SweepJob
from mnist_exp.training.events import RunSpec
from mnist_exp.training.forks import can_fork, can_train_in_fork
from mnist_exp.training.optimizers import STACKED
from mnist_exp.training.stack import Stack
from mnist_exp.training.step import STEPS_PER_CALL

# Bytes of parameters up to which a stack is fastest on a CPU: what the caches of two cores hold.
# Measured with the seed MLP, seconds an epoch and model: 0.26 for 1, 0.14 for 4, 0.10 for 16 and
# 0.14 for 64. Powers of two, as odd sizes are slower: 9 models took 0.15.
CPU_STACK_BYTES = 2**22
CPU_STACK_MOST, GPU_STACK_MOST = 64, 512
# Bytes of memory for each pixel while images are augmented, at the most. Measured: 11 for a shift
# by whole pixels, 12 for mixup, 18 for an affine map, 22 for all together.
AUGMENTATION_BYTES = 24
# the keys of `training` that may differ from run to run within a stack
RUN_SETTINGS = tuple(f.name for f in fields(RunSpec) if f.name in TrainingConfig.__annotations__)


def plan(jobs: Sequence[SweepJob], max_stack: int | None) -> list[list[SweepJob]]:
    """Return the stacks: checked jobs that differ only in numbers which a stack can carry.

    A stack has `max_stack` jobs at most; None: as many as are fastest, and fit into the memory.
    """
    groups: dict[str, list[SweepJob]] = {}
    for job in jobs:
        groups.setdefault(_common_config(job.run), []).append(job)
    stacks = []
    for group in groups.values():
        first = group[0].run
        most = 1
        if first.optimizer in STACKED:
            most = max_stack or _stack_limit([job.run for job in group])
        count = math.ceil(len(group) / most)
        # one seed beside another: a stack of one seed gathers its images once for all
        group = sorted(group, key=lambda job: job.run.config.seed)
        ends = [round(len(group) * i / count) for i in range(count + 1)]
        stacks += [group[a:b] for a, b in itertools.pairwise(ends)]
    return stacks


def _common_config(job: Job) -> str:
    """Return what the jobs of a stack have in common: the config less what a stack can carry."""
    kept = {
        key: value
        for key, value in leaves(job.task_config)
        if key not in ("seed", *(f"training.{name}" for name in RUN_SETTINGS))
        and not key.startswith(("schedule.", "tracking."))
        and not (key.startswith("optimizer.") and _is_number(value))
    }
    return json.dumps(kept, sort_keys=True)


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return is_number(value)


def _stack_limit(jobs: Sequence[Job]) -> int:
    """Return how many of these jobs are trained together fastest, and fit into the memory."""
    job = jobs[0]
    stack = Stack(job.build, [0], torch.device("cpu"))
    size = sum(p.numel() * p.element_size() for p in stack.params.values())
    if job.device.type == "cpu":
        fitting = max(1, min(CPU_STACK_MOST, CPU_STACK_BYTES // size))
        return 1 if stack.has_convolutions else 1 << (fitting.bit_length() - 1)
    if job.device.type != "cuda":
        return CPU_STACK_MOST
    shape = job.load(job.config.dataset).shape
    activations = math.prod(shape)

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal activations
        activations += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in stack.module.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        stack.module.eval()(torch.zeros(1, *shape))
    # parameters, gradients, new and best ones, two of the optimizer's state; two more of an average
    copies = 6 + 2 * any(each.config.training.ema is not None for each in jobs)
    # images and what every layer makes of them, with their gradients
    bytes_per_image = 3 * 4 * activations
    if job.stack_spec.augmentation.is_on:  # the images of a call's steps at once
        bytes_per_image += AUGMENTATION_BYTES * STEPS_PER_CALL * math.prod(shape)
    bytes_per_model = copies * size + bytes_per_image * job.config.training.batch_size
    free, _ = torch.cuda.mem_get_info(job.device)
    return max(1, min(GPU_STACK_MOST, int(0.5 * free / bytes_per_model)))


def process_count(stacks: Sequence[Sequence[SweepJob]], reporter: Reporter) -> int:
    """Return how many stacks to train at a time, each in a process of its own.

    On a CPU, models are independent but the threads of one step wait for each other some thirty
    times: a process a core is faster, much more so where other programs want a core as well. A
    message says so where torch cannot train in them.
    """
    first = stacks[0][0].run
    if first.device.type != "cpu" or not can_fork():
        return 1
    threads = max(job.run.config.training.threads or 1 for stack in stacks for job in stack)
    count = max(1, min(len(stacks), THREADS // threads))
    if count > 1 and not can_train_in_fork():
        reporter.line(
            "the stacks are trained one after the other: torch.compile or torch.export was called "
            "in this Python process before its first backward pass, so that torch cannot train in "
            "its forks. In a new Python process, several are trained at a time"
        )
        return 1
    return count


def is_compiled(stack: Sequence[SweepJob]) -> bool:
    """Return whether a stack is to be trained with a compiled step."""
    first = stack[0].run
    return should_compile([job.run for job in stack], len(first.load(first.config.dataset).train))


def cost(stack: Sequence[SweepJob]) -> float:
    """Return roughly the seconds that a stack takes, in a unit of its own: steps of many models."""
    first = stack[0].run
    images = len(first.load(first.config.dataset).train)
    return float(first.stack_spec.epoch_sizes(images).total_steps * (4 + len(stack)))


def describe_stack(stack: Sequence[SweepJob]) -> str:
    """Return the number of jobs and the swept values that they share: "4 jobs  seed=0"."""
    common = set.intersection(*(set(job.values.items()) for job in stack))
    shared = " ".join(f"{k}={v}" for k, v in stack[0].values.items() if (k, v) in common)
    return f"{count_of(len(stack), 'job')}  {shared}".rstrip()


def describe_stacks(stacks: Sequence[Sequence[SweepJob]]) -> str:
    """Return how many stacks there are of each size: "2 stacks of 6 and 1 of 5"."""
    (size, count), *others = sorted(Counter(map(len, stacks)).items(), reverse=True)
    largest = f"{count_of(count, 'stack')} of {size}"
    return " and ".join([largest, *(f"{count} of {size}" for size, count in others)])
