"""The stacked launcher: which jobs share a stack, and how the stacks are trained side by side."""

import contextlib
import itertools
import json
import math
import multiprocessing.connection
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from hydra.core.utils import JobReturn, JobStatus

from mnist_exp.config.schema import leaves
from mnist_exp.errors import reason_of
from mnist_exp.runs import train as run
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import Job
from mnist_exp.runs.recorder import THREADS
from mnist_exp.sweeps import results
from mnist_exp.sweeps.grid import Planned
from mnist_exp.sweeps.results import Outcome
from mnist_exp.sweeps.sweep import STOP, Task, count_of, outcome_of
from mnist_exp.system import signals
from mnist_exp.system.processes import end, fork, receive
from mnist_exp.tracking.run_log import RunHistory
from mnist_exp.training.compile import warm_up_compiler
from mnist_exp.training.optimizers import STACKED
from mnist_exp.training.stack import Stack

# Bytes of parameters up to which a stack is fastest on a CPU: what the caches of two cores hold.
# Measured with the seed MLP, seconds an epoch and model: 0.26 for 1, 0.14 for 4, 0.10 for 16 and
# 0.14 for 64. Powers of two, as odd sizes are slower: 9 models took 0.15.
CPU_STACK_BYTES = 2**22
CPU_STACK_MOST, GPU_STACK_MOST = 64, 512


def plan(jobs: Sequence[Planned], max_stack: int | None) -> list[list[Planned]]:
    """The stacks: jobs that differ only in numbers which a stack can carry, as many as fit."""
    groups: dict[str, list[Planned]] = {}
    for p in jobs:
        groups.setdefault(_shape(p.job), []).append(p)
    stacks = []
    for group in groups.values():
        first = group[0].job
        most = (max_stack or _stack_limit(first)) if first.optimizer in STACKED else 1
        count = math.ceil(len(group) / most)
        # one seed beside another: a stack of one seed gathers its images once for all
        group = sorted(group, key=lambda p: p.job.config.seed)
        ends = [round(len(group) * i / count) for i in range(count + 1)]
        stacks += [group[a:b] for a, b in itertools.pairwise(ends)]
    return stacks


def _shape(job: Job) -> str:
    """What the jobs of a stack have in common, as text: the config less what a stack can carry."""
    kept = {
        key: value
        for key, value in leaves(job.task_config)
        if key not in ("seed", "training.label_smoothing", "training.patience")
        and not key.startswith(("schedule.", "tracking."))
        and not (key.startswith("optimizer.") and _is_number(value))
    }
    return json.dumps(kept, sort_keys=True)


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stack_limit(job: Job) -> int:
    """How many models are trained together fastest, and fit into the memory."""
    stack = Stack(job.build, [0], torch.device("cpu"))
    size = sum(p.numel() * p.element_size() for p in stack.params.values())
    if job.device.type == "cpu":
        fitting = max(1, min(CPU_STACK_MOST, CPU_STACK_BYTES // size))
        return 1 if stack.has_convolutions else 1 << (fitting.bit_length() - 1)
    if job.device.type != "cuda":
        return CPU_STACK_MOST
    # parameters, gradients, new and best ones, two memories of the optimizer; images and what
    # every layer makes of them, with their gradients
    shape = job.load(job.config.dataset).shape
    numbers = math.prod(shape)

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal numbers
        numbers += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in stack.module.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.no_grad():
        stack.module.eval()(torch.zeros(1, *shape))
    each = 6 * size + 3 * 4 * numbers * job.config.training.batch_size
    free, _ = torch.cuda.mem_get_info(job.device)
    return max(1, min(GPU_STACK_MOST, int(0.5 * free / each)))


def launch(task: Any, max_stack: int | None) -> list[JobReturn]:
    """As a launcher of Hydra's: trains all of a sweep's jobs, and returns in their order."""
    assert isinstance(task, Task)
    outcomes = train_stacks(task, max_stack)
    return [
        JobReturn(p.words, status=JobStatus.COMPLETED, _return_value=outcomes[p.number])
        for p in task.jobs
    ]


def train_stacks(task: Task, max_stack: int | None = None) -> dict[int, Outcome]:
    """Trains a sweep's jobs, or those of `task.stacks`, stack by stack. Outcomes by the number of
    the job."""
    reporter = task.reporter()
    if task.stacks is None:
        stacks = plan(task.jobs, max_stack)
        numbers = [[p.number for p in stack] for stack in stacks]
        replace(results.Manifest.of(task.folder), stacks=numbers).save(task.folder)
    else:
        by_number = {p.number: p for p in task.jobs}
        stacks = [[by_number[number] for number in stack] for stack in task.stacks]
    processes = _processes(stacks)
    aside = f", {processes} at a time" if processes > 1 else ""
    jobs = [p for stack in stacks for p in stack]
    reporter.line(f"{count_of(len(jobs), 'job')}, {_said(stacks)}{aside}")
    named = [(f"stack {i + 1} of {len(stacks)}", stack) for i, stack in enumerate(stacks)]
    outcomes: dict[int, Outcome] = {}
    trained = _one_by_one(task, named) if processes == 1 else _side_by_side(task, named, processes)
    with contextlib.closing(trained):  # at once, and with it the processes
        for stack, found in trained:
            outcomes |= found
            failed = any(found[p.number].status != "FINISHED" for p in stack)
            if failed and task.settings.on_error == "stop":
                (task.folder / STOP).touch()
    unstarted = Outcome("NOT RUN", "an earlier job failed (sweep.on_error=stop)")
    return {p.number: outcomes.get(p.number, unstarted) for p in jobs}


Named = tuple[str, Sequence[Planned]]  # a stack and what it is called
Found = tuple[Sequence[Planned], dict[int, Outcome]]


def _processes(stacks: Sequence[Sequence[Planned]]) -> int:
    """How many stacks to train at a time, each in a process of its own.

    On a CPU, models are independent but the threads of one step wait for each other some thirty
    times: a process a core is faster, much more so where other programs want a core as well.
    Forks need Linux, and a process in which torch has started no thread for a GPU.
    """
    first = stacks[0][0].job
    if sys.platform != "linux" or torch.cuda.is_available() or first.device.type != "cpu":
        return 1
    threads = max(p.job.config.training.threads or 1 for stack in stacks for p in stack)
    return max(1, min(len(stacks), THREADS // threads))


def _one_by_one(task: Task, stacks: Sequence[Named]) -> Generator[Found]:
    reporter = task.reporter()
    assert task.uploader is not None
    task.uploader.begin()
    for name, stack in stacks:
        if not (task.folder / STOP).exists():
            reporter.line(f"\n{name}: {_label(stack)}")
            yield stack, _train_stack(task, stack, reporter, THREADS)


def _side_by_side(task: Task, stacks: Sequence[Named], processes: int) -> Generator[Found]:
    threads, uploader = THREADS // processes, task.uploader
    assert uploader is not None
    if any(map(_compiles, (stack for _, stack in stacks))):
        warm_up_compiler()
    waiting = sorted(stacks, key=lambda named: _cost(named[1]))  # the longest first
    running: dict[Connection, tuple[Any, Sequence[Planned]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes and not (task.folder / STOP).exists():
                name, stack = waiting.pop()
                signals.check()
                with uploader.quiet():
                    here, process = fork(_train_there, task, name, stack, threads)
                running[here] = process, stack
            if not running:
                return
            uploader.begin()  # after the first forks, which need not wait for its imports
            for connection in multiprocessing.connection.wait(list(running)):
                assert isinstance(connection, Connection)
                process, stack = running[connection]
                found = receive(connection, process)
                del running[connection]
                if isinstance(found, str):
                    found = {p.number: results.mark_job_killed(p.folder, found) for p in stack}
                yield stack, found
    finally:  # where a signal or an error has ended the loop
        end([process for process, _ in running.values()])


def _train_there(
    task: Task, name: str, stack: Sequence[Planned], threads: int, to: Connection
) -> None:
    signals.follow_parent()
    reporter = task.reporter(prefix=f"{name}: ")
    reporter.line(_label(stack))
    try:
        to.send(_train_stack(task, stack, reporter, threads))
    except KeyboardInterrupt:  # the other processes have it as well
        sys.exit(130)


def _compiles(stack: Sequence[Planned]) -> bool:
    first = stack[0].job
    return run.should_compile([p.job for p in stack], len(first.load(first.config.dataset).train))


def _cost(stack: Sequence[Planned]) -> float:
    """Roughly in proportion to the seconds that a stack takes: steps, of so many models."""
    own = stack[0].job.config.training
    return float(own.epochs * (4 + len(stack)) / own.batch_size)


def _label(stack: Sequence[Planned]) -> str:
    common = set.intersection(*(set(p.values.items()) for p in stack))
    shared = " ".join(f"{k}={v}" for k, v in stack[0].values.items() if (k, v) in common)
    return f"{count_of(len(stack), 'job')}  {shared}".rstrip()


def _train_stack(
    task: Task, stack: Sequence[Planned], reporter: Reporter, threads: int
) -> dict[int, Outcome]:
    jobs, numbers = [p.job for p in stack], [p.number for p in stack]
    failed = False
    try:
        task.execute(jobs, [p.folder for p in stack], numbers, reporter, threads)
    except Exception as error:  # a model can raise anything; memory can run out
        if len(stack) == 1:
            reporter.line(f"{stack[0].said}: {reason_of(error)}")
            return {stack[0].number: outcome_of(error)}
        reporter.line(
            f"the stack failed ({reason_of(error)}); its jobs are trained again in two halves, "
            f"so that the fault stays where it belongs"
        )
        failed = True  # and not from in here, where the error holds on to the stack's memory
    if failed:
        # what has an end keeps it
        ended = [p for p in stack if RunHistory.of(p.folder).status in ("FINISHED", "FAILED")]
        rest = [p for p in stack if p not in ended]
        half = (len(rest) + 1) // 2
        outcomes = {p.number: results.outcome_in(p.folder) for p in ended}
        for part in filter(None, (rest[:half], rest[half:])):
            outcomes |= _train_stack(task, part, reporter, threads)
        return outcomes
    outcomes = {p.number: results.outcome_in(p.folder) for p in stack}
    for p in stack:
        if outcomes[p.number].reason:
            reporter.line(f"{p.said}: {outcomes[p.number].reason}")
    return outcomes


def _said(stacks: Sequence[Sequence[Planned]]) -> str:
    """As in "4 stacks of 4", "2 stacks of 6 and 1 of 5"."""
    sizes = [len(stack) for stack in stacks]
    parts = [(sizes.count(size), size) for size in sorted(set(sizes), reverse=True)]
    texts = [f"{count_of(count, 'stack') if i == 0 else count} of {size}"
             for i, (count, size) in enumerate(parts)]  # fmt: skip
    return " and ".join(texts)
