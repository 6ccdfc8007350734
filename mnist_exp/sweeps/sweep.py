"""A sweep as one object: its jobs checked, launched under a parent run, and reported.

What the stacked launcher does with them is in stacked.py.
"""

import contextlib
import functools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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

from mnist_exp.config import paths
from mnist_exp.config.hydra_adapter import register
from mnist_exp.config.schema import Config, DatasetConfig, SweepConfig, identity, task_config
from mnist_exp.config.validate import validate, validate_sweep
from mnist_exp.errors import ConfigError, RunFailed, first_line, reason_of
from mnist_exp.formatting import Table
from mnist_exp.runs import train as run
from mnist_exp.runs.console import Reporter, Terminal
from mnist_exp.runs.folder import check_output_folder, check_vacant
from mnist_exp.runs.job import KEYS_IN_NAME, Job, Load, cached_loader, check_unchanged, prepare
from mnist_exp.runs.recorder import THREADS, StackPlan
from mnist_exp.sweeps import grid, report, results
from mnist_exp.sweeps.grid import Planned, refuse
from mnist_exp.sweeps.results import Outcome
from mnist_exp.system import signals, streams
from mnist_exp.system.processes import END_SECONDS, end, fork, is_running, receive
from mnist_exp.tracking.run_log import RunHistory, open_runs_at
from mnist_exp.tracking.store import check_store, store_uri
from mnist_exp.tracking.upload import Uploader

STOP = "stop"  # a file in the sweep's folder: no more jobs are to be started


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves."""

    run_id: str  # of the parent
    store: str  # MLflow's tracking URI
    folder: Path
    report: results.Report
    best: Path | None = None  # the recipe of the chosen cell
    failure: str = ""  # what went wrong, if anything
    delivered: bool = False  # MLflow has all of it

    def draw(self) -> dict[str, Any]:
        """The report's figures, by name: heat maps, learning curves."""
        return results.draw(self.report)

    def table(self) -> Table:
        """The leaderboard: a row a cell."""
        return report.leaderboard(self.report.ranked, self.report.chosen)


@dataclass
class Task:
    """What a launcher calls for each job. It is sent to other processes, so it holds little."""

    folder: Path  # of the sweep, with its record
    store_uri: str
    settings: SweepConfig
    values: dict[int, dict[str, str]]  # of each job, what was swept
    isolated: bool  # each job in a process of its own, which may die alone
    command_line: list[str]
    jobs: list[Planned] = field(default_factory=list)  # for the stacked launcher, in this process
    uploader: Uploader | None = None  # in this process
    stacks: list[list[int]] | None = None  # of a sweep that is resumed: the jobs of each
    resume: bool = False
    verbose: bool = True  # its jobs are shown

    def reporter(self, prefix: str = "") -> Reporter:
        """For one of the sweep's processes."""
        return Terminal(prefix) if self.verbose else Reporter()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"jobs": [], "uploader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        signals.follow_parent()  # in the other process
        register()  # before Hydra composes there

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
        folder, reporter = Path(config.hydra.runtime.output_dir), self.reporter()
        number = int(config.hydra.job.num)
        reporter.line(f"job {number}: {shlex.join(config.hydra.overrides.task)}")
        try:
            job = _told_apart(prepare(config, _load), self.values[number])
            self.execute([job], [folder], [number], reporter)
        except Exception as error:  # what was there at the start is there no more
            return outcome_of(error)
        return results.outcome_in(folder)

    def execute(
        self,
        jobs: Sequence[Job],
        folders: Sequence[Path],
        numbers: Sequence[int],
        reporter: Reporter,
        threads: int = THREADS,
    ) -> None:
        """Trains jobs that can share a stack, as children of the sweep."""
        tags = [
            {
                "job": str(number),
                "swept": json.dumps(self.values[number]),
                "command_line": shlex.join(self.command_line),
            }
            for number in numbers
        ]
        alone = len(jobs) == 1
        name = f"{numbers[0]}-{numbers[-1]}"  # another one for each half of a stack that failed
        plan = StackPlan(
            jobs,
            folders,
            self.store_uri,
            open_runs_at(paths.output_root()),
            tags=tags,
            parent=self.folder,
            checkpoint_dir=None if alone else self.folder / ".stacks" / name,
            defer_test=self.settings.test != "all",
            threads=threads,
        )
        run.train_stack(plan, reporter, resume=self.resume)

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
            return results.mark_job_killed(Path(config.hydra.runtime.output_dir), found)
        assert isinstance(found, Outcome)
        return found


def _run_there(task: Task, config: DictConfig, to: Connection) -> None:
    streams.replace()  # joblib's processes have Python's own
    signals.follow_parent()
    HydraConfig.instance().set_config(config)
    try:
        to.send(task.train(config))
    except KeyboardInterrupt:  # the other processes have it as well
        sys.exit(130)


@functools.cache
def _remembered() -> Load:
    return cached_loader()


def _load(asked: DatasetConfig) -> Any:
    return _remembered()(asked)


def outcome_of(error: Exception) -> Outcome:
    """Of a job that had no record to fail in."""
    return Outcome("FAILED", reason_of(error))


def run_sweep(
    context: HydraContext, master: DictConfig, planned: Sequence[Planned], verbose: bool = True
) -> SweepResult:
    """The whole of a sweep, from its jobs as `grid.jobs` gives them.

    Raises ConfigError, with nothing created, if one of them cannot be run.
    """
    name = str(OmegaConf.select(master, "hydra.runtime.choices").get("hydra/launcher"))
    if name != "basic":
        # OpenMP's threads, once started, are missing in processes that are forked from this one
        torch.set_num_threads(1)
    settings = validate_sweep(master)
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
    first = valid[0].job
    tracking = first.config.tracking
    uri = store_uri(tracking.uri, paths.output_root())
    check_store(uri, tracking.experiment, tracking.required)
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
    _make_folder(master, folder, valid, manifest)
    task = Task(
        folder=folder,
        store_uri=uri,
        settings=settings,
        values={p.number: p.values for p in valid},
        isolated=name not in ("basic", "stacked") and hasattr(os, "fork"),
        jobs=valid if name == "stacked" else [],
        command_line=list(sys.argv),
        verbose=verbose,
    )
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=master
    )
    reporter = task.reporter()
    reporter.line(f"sweep of {count_of(len(valid), 'job')}, in {folder}")

    def launch() -> dict[int, Outcome]:
        if name != "stacked":  # which forks first
            assert task.uploader is not None
            task.uploader.begin()
        returns = launcher.launch([p.words for p in valid], initial_job_idx=0)
        return {p.number: r.return_value for p, r in zip(valid, returns, strict=True)}

    return _conduct(task, first.config, uri, manifest, launch, reporter)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds the record of a sweep."""
    return any((folder / name).exists() for name in (results.MANIFEST, grid.FROZEN))


def resume_sweep(folder: Path, failed: bool, verbose: bool = True) -> SweepResult | None:
    """Goes on with a sweep from its folder alone: its jobs that are unfinished, and, if asked for,
    those that failed. None: there is nothing to go on with.

    Raises ConfigError, with nothing changed, if it cannot be.
    """
    reporter = Terminal() if verbose else Reporter()
    manifest, parent = results.Manifest.of(folder), RunHistory.of(folder)
    settings = SweepConfig.from_record(manifest.settings)
    torch.set_num_threads(1)
    planned = grid.thaw(folder)
    found = {p.number: RunHistory.of(p.folder) for p in planned}
    unfinished = {n for n, story in found.items() if story.status not in ("FINISHED", "FAILED")}
    again = {n for n, story in found.items() if story.status == "FAILED"}
    finished = len(planned) - len(unfinished) - len(again)
    to_run = len(unfinished) + (len(again) if failed else 0)
    reporter.line(
        f"sweep in {folder}: {finished} of {count_of(len(planned), 'job')} finished; "
        f"{to_run} to run, from where they stopped"
    )
    if again and not failed:
        reporter.line(f"{len(again)} that failed would be run again with --failed")
    if not to_run and parent.status == "FINISHED":
        reporter.line("it is finished; there is nothing to go on with")
        return None
    # as they were, where a job has not ended; then jobs that failed, each alone
    stacks = manifest.stacks or [[p.number] for p in planned]
    going_on = [list(stack) for stack in stacks if unfinished & set(stack)]
    alone = [[number] for number in sorted(again)] if failed else []
    needed = {number for stack in (*going_on, *alone) for number in stack}
    jobs = [p for p in planned if p.number in needed]
    check(jobs, replace(settings, skip_invalid=True))
    for p in jobs:
        if p.problem:
            raise ConfigError(f"{p.said}: {p.problem}")
        try:
            check_unchanged(p.job, found[p.number])
        except ConfigError as error:
            raise ConfigError(f"{folder / grid.FROZEN}, {p.said}: {error}") from error
    check_store(parent.uri, parent.experiment, required=False)
    task = Task(
        folder=folder,
        store_uri=parent.uri,
        settings=settings,
        values={p.number: p.values for p in planned},
        isolated=False,
        jobs=jobs,
        command_line=list(sys.argv),
        resume=True,
        verbose=verbose,
    )

    def launch() -> dict[int, Outcome]:
        from mnist_exp.sweeps.launcher import train_stacks

        outcomes: dict[int, Outcome] = {}
        for stacks in filter(None, (going_on, alone)):
            task.stacks = stacks
            outcomes |= train_stacks(task)
        return outcomes

    config = validate(task_config(composed_of(planned[0])))
    return _conduct(task, config, parent.uri, manifest, launch, reporter)


def _conduct(
    task: Task,
    config: Config,
    uri: str,
    manifest: results.Manifest,
    launch: Callable[[], dict[int, Outcome]],
    reporter: Reporter,
) -> SweepResult:
    """The sweep as one object: its record opened, its jobs run, its report made."""
    folder = task.folder
    with signals.deferred():  # what is opened has to be closed again
        parent = results.open_parent(config, uri, manifest, folder)
        (folder / STOP).unlink(missing_ok=True)  # of an earlier try, which is over
        uploader = Uploader(uri, open_runs_at(paths.output_root()), reporter.line)
        uploader.watch([folder, *(Path(job["folder"]) for job in manifest.valid)])
        task.uploader = uploader

    def conclude(outcomes: Mapping[int, Outcome], ended: str = "") -> results.Report:
        return results.conclude(
            parent, manifest, outcomes, task.settings, reporter, _load, uploader, ended
        )

    def end_jobs() -> None:
        end_workers([Path(job["folder"]) for job in manifest.valid])

    outcomes: dict[int, Outcome] = {}
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
        uploader.begin()
        found = conclude(outcomes, reason)
        reason = reason or found.failure
        with signals.deferred():  # an end is an end
            parent.end("FAILED" if reason else "FINISHED", reason)
        patience = config.tracking.flush_seconds
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(str(folder))  # that can be resumed
        try:
            end_jobs()
            conclude(outcomes, "interrupted")
        except Exception as second:  # a disk, which must not hide why it ends
            reporter.line(f"no report: {reason_of(second)}")
        finally:
            with contextlib.suppress(OSError):
                parent.end("KILLED", "interrupted")
        raise
    except Exception as error:  # the report
        with contextlib.suppress(OSError):
            parent.end("FAILED", reason_of(error))
        raise RunFailed(f"the sweep in {folder}: no report: {reason_of(error)}") from error
    finally:
        uploader.begin()
        undelivered = uploader.close(patience)
    best = folder / results.BEST if found.chosen is not None else None
    return SweepResult(run.run_id_of(folder), uri, folder, found, best, reason, not undelivered)


def _folders(master: DictConfig, valid: Sequence[Planned]) -> Path:
    """The sweep's folder; each job is told its own in there. Creates none."""
    asked = str(master.hydra.sweep.dir)
    if not asked.strip():
        raise ConfigError("hydra.sweep.dir=: must be a folder of its own for the sweep's output")
    folder = Path(asked).resolve()
    check_output_folder(folder, "hydra.sweep.dir")
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


def _make_folder(
    master: DictConfig, folder: Path, valid: Sequence[Planned], manifest: results.Manifest
) -> None:
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_dict(master):
            master.hydra.sweep.dir = str(folder)  # a time in it is now
            if (n_jobs := master.hydra.launcher.get("n_jobs")) is not None:
                master.hydra.launcher.n_jobs = min(n_jobs, len(valid))  # no process for nothing
        OmegaConf.save(master, folder / "multirun.yaml")
        grid.freeze(valid, folder)
        manifest.save(folder)
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
                tracking = p.job.config.tracking
                uri = store_uri(tracking.uri, paths.output_root())
                places.add((uri, tracking.experiment))
                if len(places) > 1:
                    raise ConfigError(
                        f"{p.said}: tracking.uri and tracking.experiment cannot be swept: a sweep "
                        f"is one object, in one experiment"
                    )
                twin = seen.setdefault(identity(p.job.task_config), p)
                if twin is not p:
                    p.problem = f"the same as {twin.said}; its result would be the same as well"
        refuse(p, settings)


def _told_apart(job: Job, values: Mapping[str, str]) -> Job:
    """With what is swept in the run's name, unless that was chosen."""
    if job.config.tracking.run_name is not None:
        return job
    short = report.short_names(list(values))
    parts = [f"{short[key]}={value}" for key, value in values.items() if key not in KEYS_IN_NAME]
    return replace(job, name=" ".join([job.name, *parts]))


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


def end_workers(folders: Sequence[Path]) -> None:
    """Ends joblib's processes, which may outlive their launcher, and waits for their jobs."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is None:
        return
    loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    late = time.monotonic() + END_SECONDS
    for folder in folders:
        while not (story := RunHistory.of(folder)).status and time.monotonic() < late:
            if not story.key or not is_running(story.owner):
                break
            time.sleep(0.05)
