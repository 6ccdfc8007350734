"""A sweep as one object: its jobs checked, launched under a parent run, and reported.

What the stacked launcher does with them is in stacked.py.
"""

import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_exp import config as configs
from mnist_exp import grid, journal, report, results, run, signals
from mnist_exp.config import SweepConfig
from mnist_exp.console import Reporter, Terminal
from mnist_exp.courier import Courier
from mnist_exp.errors import ConfigError, RunFailed, reason_of
from mnist_exp.grid import Planned, refuse
from mnist_exp.job import NAMED, Job, Load, prepare, remembering
from mnist_exp.record import Result, check_folder, check_vacant
from mnist_exp.results import Outcome
from mnist_exp.tracker import Story, index_at
from mnist_exp.tracking import Delivered, first_line

END_SECONDS = 4.0  # that a process has to write its checkpoint and its records
STOP = "stop"  # a file in the sweep's folder: no more jobs are to be started


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves."""

    run_id: str  # of the parent
    store: str  # MLflow's tracking URI
    folder: Path
    best: Path | None = None  # the recipe of the chosen cell
    failure: str = ""  # what went wrong, if anything
    delivered: bool = False  # MLflow has all of it


@dataclass
class Task:
    """What a launcher calls for each job. It is sent to other processes, so it holds little."""

    folder: Path  # of the sweep, with its record
    settings: SweepConfig
    values: dict[int, dict[str, str]]  # of each job, what was swept
    isolated: bool  # each job in a process of its own, which may die alone
    command_line: list[str]
    jobs: list[Planned] = field(default_factory=list)  # for the stacked launcher, in this process
    courier: Courier | None = None  # in this process
    stacks: list[list[int]] | None = None  # of a sweep that is resumed: the jobs of each
    resume: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"jobs": [], "courier": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        signals.follow_parent()  # in the other process
        configs.register()  # before Hydra composes there

    def __call__(self, config: DictConfig) -> Outcome:
        """Runs the job that Hydra has composed in this process."""
        with open_dict(config):
            config.hydra = OmegaConf.create({"hydra": HydraConfig.get()}).hydra
        if (self.folder / STOP).exists():
            return Outcome("NOT RUN", "an earlier job failed (sweep.on_error=stop)")
        outcome = self._alone(config) if self.isolated else self.train(config)
        if outcome.status != "FINISHED" and self.settings.on_error == "stop":
            (self.folder / STOP).touch()
        return outcome

    def train(self, config: DictConfig) -> Outcome:
        """One job, in this process."""
        folder, reporter = Path(config.hydra.runtime.output_dir), Terminal()
        number = int(config.hydra.job.num)
        reporter.line(f"job {number}: {shlex.join(config.hydra.overrides.task)}")
        try:
            job = prepare(config, _load)
            (result,) = self.execute([job], [folder], [number], reporter)
        except Exception as error:  # what was there at the start is there no more
            return outcome_of(error)
        return outcome_of(result)

    def execute(
        self,
        jobs: Sequence[Job],
        folders: Sequence[Path],
        numbers: Sequence[int],
        reporter: Reporter,
        threads: int = run.THREADS,
    ) -> list[Result | Exception]:
        """Jobs that can share a stack, as children of the sweep."""
        tags = [
            {
                "job": str(number),
                "swept": json.dumps(self.values[number]),
                "command_line": shlex.join(self.command_line),
            }
            for number in numbers
        ]
        alone = len(jobs) == 1
        return run.execute(
            jobs,
            folders,
            reporter,
            tags=tags,
            parent=self.folder,
            place=None if alone else self.folder / ".stacks" / str(numbers[0]),
            finished=self.settings.test == "all",
            threads=threads,
            resume=self.resume,
        )

    def _alone(self, config: DictConfig) -> Outcome:
        """One job in a process of its own: what kills it ends that job alone.

        A fork, as this process trains nothing itself and has imported what takes seconds.
        """
        here, process = fork(_run_there, self, config)
        try:
            found = receive(here, process)
        finally:  # where a signal has ended the waiting
            end([process])
        if isinstance(found, str):
            return results.mark_killed(Path(config.hydra.runtime.output_dir), found)
        assert isinstance(found, Outcome)
        return found


def _run_there(task: Task, config: DictConfig, to: Connection) -> None:
    signals.follow_parent()
    HydraConfig.instance().set_config(config)
    to.send(task.train(config))


@functools.cache
def _remembered() -> Load:
    return remembering()


def _load(asked: configs.DatasetConfig) -> Any:
    return _remembered()(asked)


def outcome_of(result: Result | Exception) -> Outcome:
    """What `execute` says of a job, in a form that can be sent to another process."""
    if isinstance(result, Exception):
        return Outcome("FAILED", reason_of(result))
    return Outcome("FINISHED")


def run_sweep(context: HydraContext, master: DictConfig, planned: Sequence[Planned]) -> Swept:
    """The whole of a sweep, from its jobs as `grid.jobs` gives them.

    Raises ConfigError, with nothing created, if one of them cannot be run.
    """
    name = str(OmegaConf.select(master, "hydra.runtime.choices").get("hydra/launcher"))
    if name != "basic":
        # OpenMP's threads, once started, are missing in processes that are forked from this one
        torch.set_num_threads(1)
    settings = configs.validate_sweep(master)
    max_stack = master.hydra.launcher.get("max_stack")
    if max_stack is not None and max_stack < 1:
        raise ConfigError(f"hydra.launcher.max_stack={max_stack}: must be 1 or more, or null")
    if master.hydra.launcher.get("n_jobs") == 0:
        raise ConfigError("hydra.launcher.n_jobs=0: must be 1 or more, or -1 for all processors")
    check(planned, settings)
    invalid = [p for p in planned if p.problem]
    valid = [p for p in planned if not p.problem]
    if not valid:
        raise ConfigError(f"no job is left: {invalid[0].said}: {invalid[0].problem}")
    for number, p in enumerate(valid):  # as the launcher will number them
        p.number = number
    folder = _folders(master, valid)
    check_vacant(folder)
    manifest = results.Manifest(
        launcher=name,
        settings=asdict(settings),
        jobs=[
            {"values": p.values, "problem": p.problem, "folder": str(p.folder)}
            for p in (*valid, *invalid)
        ],
    )
    first = valid[0].job
    assert first is not None
    _make_folder(master, folder, valid)
    task = Task(
        folder=folder,
        settings=settings,
        values={p.number: p.values for p in valid},
        isolated=name not in ("basic", "stacked") and hasattr(os, "fork"),
        jobs=valid if name == "stacked" else [],
        command_line=list(sys.argv),
    )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=master
    )
    reporter = Terminal()
    reporter.line(f"sweep of {count_of(len(valid), 'job')}, in {folder}")

    def launch() -> list[Outcome]:
        if name != "stacked":  # which forks first
            assert task.courier is not None
            task.courier.begin()
        returns = launcher.launch([p.words for p in valid], initial_job_idx=0)
        return [r.return_value for r in returns]

    return _conduct(task, first, manifest, launch, reporter)


def resume_sweep(folder: Path, failed: bool, reporter: Reporter) -> Swept:
    """Goes on with a sweep from its folder alone: its jobs that are unfinished, and, if asked for,
    those that failed. Raises ConfigError, with nothing changed, if it cannot be.
    """
    manifest = results.Manifest.of(folder)
    settings = SweepConfig(**manifest.settings)
    torch.set_num_threads(1)
    planned = grid.thaw(folder)
    found = {p.number: Story.of(p.folder) for p in planned}
    done = ("FINISHED", "FAILED") if not failed else ("FINISHED",)
    waiting = {p.number for p in planned if found[p.number].status not in done}
    finished = sum(story.status == "FINISHED" for story in found.values())
    reporter.line(
        f"sweep in {folder}: {finished} of {count_of(len(planned), 'job')} finished; "
        f"{len(waiting)} to run, from where they stopped"
    )
    check(planned, settings)
    stacks = manifest.stacks or [[p.number] for p in planned]
    first = planned[0].job
    assert first is not None
    task = Task(
        folder=folder,
        settings=settings,
        values={p.number: p.values for p in planned},
        isolated=False,
        jobs=planned,
        command_line=list(sys.argv),
        stacks=list(_unfinished(stacks, found, failed)),
        resume=True,
    )
    (folder / STOP).unlink(missing_ok=True)

    def launch() -> list[Outcome]:
        from mnist_exp.stacked import train_stacks

        if not task.stacks:
            return []
        returned = train_stacks(task, None)
        return [r.return_value for r in returned]

    return _conduct(task, first, manifest, launch, reporter)


def _unfinished(
    stacks: Sequence[Sequence[int]], found: Mapping[int, Story], failed: bool
) -> Iterator[list[int]]:
    """The stacks to train: as they were, where a job has not ended; and jobs that failed, alone."""
    for stack in stacks:
        if any(found[number].status not in ("FINISHED", "FAILED") for number in stack):
            yield list(stack)
        if failed:
            yield from ([number] for number in stack if found[number].status == "FAILED")


def _conduct(
    task: Task,
    first: Job,
    manifest: results.Manifest,
    launch: Callable[[], list[Outcome]],
    reporter: Reporter,
) -> Swept:
    """The sweep as one object: its record opened, its jobs run, its report made."""
    folder = task.folder
    with signals.deferred():  # what is opened has to be closed again
        parent = results.open_parent(first, manifest, folder)
        courier = Courier(first.store_uri, index_at(configs.output_root()), reporter.line)
        courier.watch([folder, *(Path(job["folder"]) for job in manifest.valid)])
        task.courier = courier

    def conclude(outcomes: Sequence[Outcome], ended: str = "") -> results.Report:
        return results.conclude(
            parent, manifest, outcomes, task.settings, reporter, _load, courier, ended
        )

    def end_jobs() -> None:
        _end_workers([Path(job["folder"]) for job in manifest.valid])

    outcomes: list[Outcome] = []
    patience = run.INTERRUPTED_SECONDS
    reason = ""
    try:
        try:
            signals.check()
            outcomes = launch()
        except Exception as error:  # the launcher itself
            reason = f"the launcher failed: {first_line(error)}"
            end_jobs()
        signals.check()
        courier.begin()
        found = conclude(outcomes, reason)
        reason = reason or found.failure
        parent.end("FAILED" if reason else "FINISHED", reason)
        patience = first.config.tracking.flush_seconds
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(str(folder))  # that can be resumed
        try:
            end_jobs()
            conclude(outcomes, "interrupted")
        finally:
            parent.end("KILLED", "interrupted")
        raise
    except Exception as error:  # the report
        parent.end("FAILED", reason_of(error))
        raise RunFailed(f"the sweep in {folder}: no report: {reason_of(error)}") from error
    finally:
        courier.begin()
        undelivered = courier.close(patience)
    run_id = Delivered.of(folder).run_id
    return Swept(
        run_id or Story.of(folder).key,
        first.store_uri,
        folder,
        folder / results.BEST if found.chosen is not None else None,
        reason,
        bool(run_id) and not undelivered,
    )


def _end_workers(folders: Sequence[Path]) -> None:
    """Ends joblib's processes, which may outlive their launcher, and waits for their jobs."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is None:
        return
    loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    late = time.monotonic() + END_SECONDS
    for folder in folders:
        while not (story := Story.of(folder)).status and time.monotonic() < late:
            if not story.key or not journal.is_alive(story.owner):
                break
            time.sleep(0.05)


def _folders(master: DictConfig, valid: Sequence[Planned]) -> Path:
    """The sweep's folder; each job is told its own in there. Creates none."""
    asked = str(master.hydra.sweep.dir)
    if not asked.strip():
        raise ConfigError("hydra.sweep.dir=: must be a folder of its own for the sweep's output")
    folder = Path(asked).resolve()
    check_folder(folder, "hydra.sweep.dir")
    owners: dict[Path, Planned] = {}
    for p in valid:
        try:
            p.folder = _folder(folder, p)
        except OmegaConfBaseException as error:
            raise ConfigError(f"hydra.sweep.subdir: {str(error).splitlines()[0]}") from error
        if (other := owners.setdefault(p.folder, p)) is not p:
            raise ConfigError(
                f"hydra.sweep.subdir: {other.said} and {p.said} would share the folder {p.folder}. "
                f"Leave it out, or refer to the job: hydra.sweep.subdir='${{hydra.job.num}}'"
            )
    return folder


def _make_folder(master: DictConfig, folder: Path, valid: Sequence[Planned]) -> None:
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_dict(master):
            master.hydra.sweep.dir = str(folder)  # a time in it is now
            if (n_jobs := master.hydra.launcher.get("n_jobs")) is not None:
                master.hydra.launcher.n_jobs = min(n_jobs, len(valid))  # no process for nothing
        OmegaConf.save(master, folder / "multirun.yaml")
        grid.freeze(valid, folder)
    except OSError as error:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"{folder}: the sweep's folder cannot be written ({error.strerror}). "
            f"Choose another: hydra.sweep.dir=FOLDER"
        ) from error


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def check(planned: Sequence[Planned], settings: SweepConfig) -> None:
    """Builds what every job asks for, and notes the problem of those that cannot be run.

    Raises ConfigError for the first of those, unless they are to be skipped.
    """
    seen: dict[str, Planned] = {}
    places = set()
    for p in planned:
        if p.composed is not None and not p.problem:
            try:
                p.job = _told_apart(prepare(p.composed, _load), p.values)
            except ConfigError as error:
                p.problem = str(error)
            else:
                places.add((p.job.store_uri, p.job.config.tracking.experiment))
                if len(places) > 1:
                    raise ConfigError(
                        f"{p.said}: tracking.uri and tracking.experiment cannot be swept: a sweep "
                        f"is one object, in one experiment"
                    )
                twin = seen.setdefault(configs.identity(p.job.asked), p)
                if twin is not p:
                    p.problem = f"the same as {twin.said}; its result would be the same as well"
        refuse(p, settings)


def _told_apart(job: Job, values: Mapping[str, str]) -> Job:
    """With what is swept in the run's name, unless that was chosen."""
    if job.config.tracking.run_name is not None:
        return job
    short = report.short_names(list(values))
    parts = [f"{short[key]}={value}" for key, value in values.items() if key not in NAMED]
    return replace(job, name=" ".join([job.name, *parts]))


def fork(function: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
    """Calls a function in a process of its own. It gets, as its last argument, what it can `send`
    an answer by, which arrives at the connection that is returned beside the process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    return here, process


def receive(connection: Connection, process: Any) -> Any:
    """What a process has sent; or, where it died without a word, what became of it (str)."""
    try:
        found = connection.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if code == 130:  # Ctrl-C, which ends the sweep
            raise KeyboardInterrupt from None
        if code < 0:
            return f"its process was killed ({signal.Signals(-code).name})"
        return f"its process ended with status {code}"
    process.join()
    return found


def end(processes: Sequence[Any]) -> None:
    """Ends processes: those that train write their checkpoints and records first."""
    for process in processes:
        process.terminate()
    late = time.monotonic() + END_SECONDS
    try:
        for process in processes:
            process.join(max(0.0, late - time.monotonic()))
    finally:  # a second Ctrl-C does not wait
        for process in processes:
            process.kill()
            process.join()


def _folder(sweep: Path, planned: Planned) -> Path:
    """The output folder of a job, which its config is told."""
    composed = composed_of(planned)
    with read_write(composed), open_dict(composed):
        composed.hydra.job.num = composed.hydra.job.id = planned.number
        composed.hydra.sweep.dir = str(sweep)
        HydraConfig.instance().set_config(composed)  # for what its folder's name may refer to
        folder = sweep / str(composed.hydra.sweep.subdir)
        with read_write(composed.hydra.runtime):
            composed.hydra.runtime.output_dir = str(folder)
    return folder


def composed_of(planned: Planned) -> DictConfig:
    assert planned.composed is not None, planned.problem
    return planned.composed
