"""The launchers: functions that train the jobs of a sweep and return what each has come to.

`stacked` is this project's own: it trains the jobs that can share a stack together, and the stacks
in processes side by side. `basic` and `joblib` are Hydra's, which train one job after the other,
or each in a process of its own. Another engine is one more function in `choose_launcher`.
"""

import contextlib
import functools
import json
import multiprocessing.connection
import shlex
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from mnist_exp.config import paths
from mnist_exp.config.hydra_adapter import register
from mnist_exp.config.names import KEYS_IN_NAME, short_names
from mnist_exp.config.schema import SweepConfig
from mnist_exp.errors import reason_of
from mnist_exp.formatting import count_of
from mnist_exp.run.console import Reporter, Terminal
from mnist_exp.run.job import CachedLoader, Job, prepare
from mnist_exp.run.recorder import THREADS, StackPlan
from mnist_exp.run.train import train_stack
from mnist_exp.sweeps import stacks
from mnist_exp.sweeps.manifest import Manifest, SweepJob
from mnist_exp.sweeps.report import JobResult
from mnist_exp.sweeps.results import mark_job_killed, result_of, unrecorded
from mnist_exp.system import signals, streams
from mnist_exp.system.processes import END_SECONDS, end, fork, is_running, receive
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import mark_failed, open_runs_at
from mnist_exp.training.compile import warm_up_compiler
from mnist_exp.training.forks import can_train_in_fork

STOP = "stop"  # a file in the sweep's folder: no more jobs are to be started
Results = dict[int, JobResult]  # by the number of the job
Jobs = Sequence[SweepJob]  # in a stack: those that share it
load_cached = CachedLoader()  # the data sets of all jobs in this process


@dataclass(frozen=True)
class SweepSetup:
    """The settings that the jobs of a sweep share; pickled for other processes."""

    folder: Path  # of the sweep, with its record
    store_uri: str
    settings: SweepConfig
    command: str  # that was typed
    verbose: bool = True  # its jobs are shown in the terminal
    resume: bool = False  # its jobs go on from their newest checkpoints

    def reporter(self, prefix: str = "") -> Reporter:
        """Return what shows the jobs of one process; its lines begin with `prefix`."""
        return Terminal(prefix) if self.verbose else Reporter()

    @property
    def is_stopped(self) -> bool:
        """True where no more jobs are to be started."""
        return (self.folder / STOP).exists()

    def stop_after(self, results: Sequence[JobResult]) -> None:
        """Let no more jobs start if one has failed and the sweep is to stop then."""
        failed = any(result.status != "FINISHED" for result in results)
        if failed and self.settings.on_error == "stop":
            (self.folder / STOP).touch()

    def not_run(self, job: SweepJob) -> JobResult:
        """Return the result of a job that was not started."""
        return unrecorded(job, "NOT RUN", "an earlier job failed (sweep.on_error=stop)")

    def train(self, jobs: Jobs, reporter: Reporter, threads: int = THREADS) -> None:
        """Train jobs that share a stack, as children of the sweep, with so many threads."""
        tags = [
            {"job": str(job.number), "swept": json.dumps(job.values), "command_line": self.command}
            for job in jobs
        ]
        name = f"{jobs[0].number}-{jobs[-1].number}"  # another one for each half of a stack
        plan = StackPlan(
            [job.run for job in jobs],
            [job.folder for job in jobs],
            self.store_uri,
            open_runs_at(paths.output_root()),
            tags=tags,
            parent=self.folder,
            checkpoint_dir=None if len(jobs) == 1 else self.folder / ".stacks" / name,
            defer_test=self.settings.test != "all",
            threads=threads,
        )
        train_stack(plan, reporter, resume=self.resume)


Launcher = Callable[[SweepSetup, Manifest], Results]  # it trains the jobs that can be run, checked


def choose_launcher(context: HydraContext, master: DictConfig) -> Launcher:
    """Return the launcher that `hydra/launcher` names in the config that all jobs share."""
    if launcher_name(master) == "stacked":
        return functools.partial(launch_stacked, max_stack=master.hydra.launcher.max_stack)
    return functools.partial(launch_by_hydra, context=context, master=master)


def launcher_name(master: DictConfig) -> str:
    """Return the option of `hydra/launcher` that was chosen."""
    return str(OmegaConf.select(master, "hydra.runtime.choices").get("hydra/launcher"))


def check_job(job: SweepJob) -> Job:
    """Return what a job's run needs, by building it. Raise ConfigError if it cannot be run."""
    return with_swept_values_in_name(prepare(job.config, load_cached), job.values)


def with_swept_values_in_name(job: Job, values: Mapping[str, str]) -> Job:
    """Return a job that has the swept values in its run's name, unless that was chosen."""
    if job.config.tracking.run_name is not None:
        return job
    short = short_names(list(values))
    parts = [f"{short[key]}={value}" for key, value in values.items() if key not in KEYS_IN_NAME]
    return replace(job, name=" ".join([job.name, *parts]))


# the stacked launcher


def launch_stacked(setup: SweepSetup, manifest: Manifest, max_stack: int | None) -> Results:
    """Train jobs, those that can share a stack together.

    Args:
        setup: What the jobs have in common.
        manifest: The jobs; its file is written again, with the stacks.
        max_stack: The most jobs of a stack; None for as many as are fastest.
    """
    planned = stacks.plan(manifest.valid, max_stack)
    manifest.stacks = [[job.number for job in stack] for stack in planned]
    manifest.save(setup.folder)
    return train_stacks(setup, planned)


def train_stacks(setup: SweepSetup, planned: Sequence[Jobs]) -> Results:
    """Train stacks, several at a time where that is faster."""
    processes = stacks.process_count(planned, setup.reporter())
    at_a_time = f", {processes} at a time" if processes > 1 else ""
    jobs = [job for stack in planned for job in stack]
    text = f"{count_of(len(jobs), 'job')}, {stacks.describe_stacks(planned)}{at_a_time}"
    setup.reporter().line(text)
    named = [(f"stack {i} of {len(planned)}", stack) for i, stack in enumerate(planned, start=1)]
    if processes == 1:
        trained = train_sequentially(setup, named)
    else:
        trained = train_in_parallel(setup, named, processes)
    results: Results = {}
    with contextlib.closing(trained):  # at once, and with it the processes
        for stack_results in trained:
            results |= stack_results
            setup.stop_after(list(stack_results.values()))
    return {job.number: results.get(job.number) or setup.not_run(job) for job in jobs}


def train_sequentially(setup: SweepSetup, named: Sequence[tuple[str, Jobs]]) -> Generator[Results]:
    """Train stacks, each with its name, in this process, and yield the results of each."""
    reporter = setup.reporter()
    for name, stack in named:
        if not setup.is_stopped:
            reporter.line(f"\n{name}: {stacks.describe_stack(stack)}")
            yield _train_or_halve(setup, stack, reporter, THREADS)


def train_in_parallel(
    setup: SweepSetup, named: Sequence[tuple[str, Jobs]], processes: int
) -> Generator[Results]:
    """Train stacks, each with its name, in so many processes; yield the results as they come."""
    if any(stacks.is_compiled(stack) for _, stack in named):
        warm_up_compiler()
    waiting = sorted(named, key=lambda item: stacks.cost(item[1]))  # the longest first
    running: dict[Connection, tuple[Any, Jobs]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes and not setup.is_stopped:
                name, stack = waiting.pop()
                signals.check()
                connection, process = fork(worker, setup, name, stack, THREADS // processes)
                running[connection] = process, stack
            if not running:
                return
            for ready in multiprocessing.connection.wait(list(running)):
                assert isinstance(ready, Connection)
                process, stack = running[ready]
                answer = receive(ready, process)
                del running[ready]
                if isinstance(answer, str):
                    answer = {job.number: mark_job_killed(job, answer) for job in stack}
                yield answer
    finally:  # where a signal or an error has ended the loop
        end([process for process, _ in running.values()])


def worker(setup: SweepSetup, name: str, stack: Jobs, threads: int) -> Results:
    """Train a stack in a process of its own."""
    reporter = setup.reporter(prefix=f"{name}: ")
    reporter.line(stacks.describe_stack(stack))
    return _train_or_halve(setup, stack, reporter, threads)


def _train_or_halve(setup: SweepSetup, stack: Jobs, reporter: Reporter, threads: int) -> Results:
    """Train a stack, with `threads` threads unless the config gives their number.

    Where it fails, its halves are trained, until the fault is alone.
    """
    try:
        setup.train(stack, reporter, threads)
    except Exception as error:  # a model can raise anything; memory can run out
        if len(stack) == 1:
            reporter.line(f"{stack[0].describe()}: {reason_of(error)}")
            with contextlib.suppress(OSError):  # a disk without room for a line; the result has it
                mark_failed(stack[0].folder, reason_of(error))
            return {stack[0].number: unrecorded(stack[0], "FAILED", reason_of(error))}
        reporter.line(
            f"the stack failed ({reason_of(error)}); its jobs are trained again in two halves, "
            f"so that the fault stays where it belongs"
        )
    else:
        results = {job.number: result_of(job) for job in stack}
        for job in stack:
            if reason := results[job.number].reason:
                reporter.line(f"{job.describe()}: {reason}")
        return results
    # not from within `except`, where the error holds on to the stack's memory
    ended = [job for job in stack if RunHistory.of(job.folder).is_over]
    rest = [job for job in stack if job not in ended]
    middle = (len(rest) + 1) // 2
    results = {job.number: result_of(job) for job in ended}
    for half in filter(None, (rest[:middle], rest[middle:])):
        results |= _train_or_halve(setup, half, reporter, threads)
    return results


# Hydra's launchers


def launch_by_hydra(
    setup: SweepSetup, manifest: Manifest, context: HydraContext, master: DictConfig
) -> Results:
    """Train jobs by the launcher of Hydra's that the config names.

    Args:
        setup: What the jobs have in common.
        manifest: The jobs.
        context: What the launcher needs.
        master: The config that the jobs have in common.
    """
    task = HydraTask(setup, is_isolating=launcher_name(master) != "basic")
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=master
    )
    jobs = manifest.valid
    # where the command was typed are the modules of the user, and what they read
    overrides = [[*job.overrides, "hydra.job.chdir=false"] for job in jobs]
    try:
        returns = launcher.launch(overrides, initial_job_idx=0)
    except BaseException:
        with contextlib.suppress(Exception):  # a disk, which must not hide why it ends
            end_workers([job.folder for job in jobs])
        raise
    return {job.number: r.return_value for job, r in zip(jobs, returns, strict=True)}


load_jobs = functools.cache(Manifest.load_configs)  # of a sweep's folder


@dataclass
class HydraTask:
    """The function that Hydra's launchers call for each job; it is pickled for other processes."""

    setup: SweepSetup
    is_isolating: bool  # each job is trained in a process of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        signals.follow_parent()  # in the other process
        register()  # before Hydra composes there

    def __call__(self, config: DictConfig) -> JobResult:
        """Train the job of the number that Hydra gives it, with the config that was checked."""
        job = load_jobs(self.setup.folder)[HydraConfig.get().job.num]
        if self.setup.is_stopped:
            return self.setup.not_run(job)
        in_fork = self.is_isolating and can_train_in_fork()
        result = self._train_isolated(job) if in_fork else self.train(job)
        self.setup.stop_after([result])
        return result

    def train(self, job: SweepJob) -> JobResult:
        """Train a job in this process."""
        reporter = self.setup.reporter()
        reporter.line(f"job {job.number}: {shlex.join(job.overrides)}")
        try:
            job.checked = check_job(job)
            self.setup.train([job], reporter)
        except Exception as error:  # what was there at the start is there no more
            return unrecorded(job, "FAILED", reason_of(error))
        return result_of(job)

    def _train_isolated(self, job: SweepJob) -> JobResult:
        """Train a job in a process of its own: what kills it ends that job alone.

        A fork, as this process trains nothing itself and has imported what takes seconds.
        """
        connection, process = fork(_isolated_worker, self, job)
        try:
            answer = receive(connection, process)
        finally:  # where a signal has ended the waiting
            end([process])
        if isinstance(answer, str):
            return mark_job_killed(job, answer)
        assert isinstance(answer, JobResult)
        return answer


def _isolated_worker(task: HydraTask, job: SweepJob) -> JobResult:
    """Train a job in the process that was forked for it."""
    streams.replace_standard_streams()  # joblib's processes have Python's own
    return task.train(job)


def end_workers(folders: Sequence[Path]) -> None:
    """End joblib's processes, which may outlive their launcher, and wait for their jobs."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is None:
        return
    loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    late = time.monotonic() + END_SECONDS
    for folder in folders:
        while not (history := RunHistory.of(folder)).status and time.monotonic() < late:
            if not history.key or not is_running(history.owner):
                break
            time.sleep(0.05)
