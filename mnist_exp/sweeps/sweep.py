"""A sweep as one object: its jobs checked, launched under a parent run, and reported."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.config import paths
from mnist_exp.config.schema import Config, SweepConfig, identity, task_config
from mnist_exp.config.validate import validate, validate_sweep
from mnist_exp.errors import ConfigError, RunFailed, first_line, reason_of
from mnist_exp.formatting import Table, count_of
from mnist_exp.run.console import Reporter
from mnist_exp.run.folder import (
    check_output_folder,
    check_registry,
    check_vacant,
    new_output_folder,
)
from mnist_exp.run.job import check_unchanged, warn
from mnist_exp.run.on_end import run_on_end
from mnist_exp.run.provenance import check_names
from mnist_exp.run.recorder import record_failure
from mnist_exp.run.train import INTERRUPTED_SECONDS, run_id_of
from mnist_exp.sweeps import finish
from mnist_exp.sweeps.grid import raise_if_invalid
from mnist_exp.sweeps.launcher import (
    STOP,
    Results,
    SweepSetup,
    check_job,
    choose_launcher,
    launcher_name,
    load_cached,
    train_stacks,
)
from mnist_exp.sweeps.manifest import CONFIGS, MANIFEST, Manifest, SweepJob
from mnist_exp.sweeps.report_files import BEST
from mnist_exp.sweeps.results import Report
from mnist_exp.system import signals
from mnist_exp.tracking.address import store_uri
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import open_runs_at
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.uploader import Uploader


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep that has ended."""

    run_id: str  # of the parent
    store: str  # MLflow's tracking URI
    folder: Path
    report: Report
    best: Path | None = None  # the recipe of the chosen cell
    failure: str = ""  # what went wrong, if anything
    uploaded: bool = False  # MLflow has all of it

    def draw(self) -> dict[str, Any]:
        """Return the report's figures, by name: heat maps, learning curves."""
        return self.report.draw()

    def table(self) -> Table:
        """Return the leaderboard: a row a cell."""
        return self.report.table()


def run_sweep(
    context: HydraContext,
    master: DictConfig,
    jobs: Sequence[SweepJob],
    uploader: Uploader,
    reporter: Reporter,
) -> SweepResult:
    """Run a sweep from beginning to end. Raise ConfigError, with nothing created, if it cannot be.

    Args:
        context: What Hydra's launchers need.
        master: The config that the jobs have in common.
        jobs: The jobs, as `grid.jobs` gives them.
        uploader: Uploads their records.
        reporter: Tells whether the jobs and the report are shown.
    """
    name = launcher_name(master)
    if name != "basic":
        # OpenMP's threads, once started, are missing in processes that are forked from this one
        torch.set_num_threads(1)
    settings = validate_sweep(master)
    _check_launcher_options(master.hydra.launcher)
    load_cached.forget()
    check(jobs, settings)
    valid, invalid = [j for j in jobs if not j.problem], [j for j in jobs if j.problem]
    if not valid:
        raise ConfigError(f"no job is left: {invalid[0].describe()}: {invalid[0].problem}")
    for job in valid:
        check_names(job.run)
    warn([job.run for job in valid])
    manifest = Manifest(name, asdict(settings), [*valid, *invalid])
    for number, job in enumerate(manifest.jobs):  # as the launcher will number them
        job.number = number
    config = valid[0].run.config
    uri = store_uri(config.tracking.uri, paths.output_root())
    check_registry(open_runs_at(paths.output_root()))
    check_store(uri, config.tracking.experiment, config.tracking.required)
    folder = _choose_folders(master, valid)
    check_vacant(folder)
    _write_folder(master, folder, manifest)
    setup = SweepSetup(folder, uri, settings, shlex.join(sys.argv), reporter.verbose)
    reporter.line(f"sweep of {count_of(len(valid), 'job')}, in {folder}")
    launcher = choose_launcher(context, master)
    return _conduct(setup, manifest, config, uploader, lambda: launcher(setup, manifest))


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds the record of a sweep."""
    return any((folder / name).exists() for name in (MANIFEST, CONFIGS))


def resume_sweep(
    folder: Path, failed: bool, uploader: Uploader, reporter: Reporter
) -> SweepResult | None:
    """Go on with a sweep from its folder alone; return None if there is nothing to go on with.

    Args:
        folder: The folder.
        failed: The jobs that failed are run again, besides those that are unfinished.
        uploader: Uploads the records of the jobs.
        reporter: Tells whether the jobs and the report are shown.

    Raises:
        ConfigError: It cannot go on. Nothing has been changed.
    """
    manifest, parent = Manifest.load(folder), RunHistory.of(folder)
    settings, command = manifest.sweep_config, shlex.join(sys.argv)
    setup = SweepSetup(folder, parent.uri, settings, command, reporter.verbose, resume=True)
    torch.set_num_threads(1)
    load_cached.forget()
    jobs = Manifest.load_configs(folder)
    reporter.stop()  # its announcement, as another reporter prints from here on
    rounds = _remaining_stacks(setup, manifest, jobs, failed)
    to_run = {job.number for stacks in rounds for stack in stacks for job in stack}
    if not to_run and parent.status == "FINISHED":
        setup.reporter().line("it is finished; there is nothing to go on with")
        return None
    _check_unchanged([job for job in jobs if job.number in to_run], setup)
    check_registry(open_runs_at(paths.output_root()))
    check_store(parent.uri, parent.experiment, required=False)

    def launch() -> Results:
        results: Results = {}
        for stacks in filter(None, rounds):
            results |= train_stacks(setup, stacks)
        return results

    config = validate(task_config(jobs[0].config))
    return _conduct(setup, manifest, config, uploader, launch)


def _remaining_stacks(
    setup: SweepSetup, manifest: Manifest, jobs: Sequence[SweepJob], failed: bool
) -> list[list[list[SweepJob]]]:
    """Return the stacks to resume, and say how many jobs those are.

    First stacks as they were, where a job has not ended; then jobs that failed, each alone.

    Args:
        setup: What the jobs have in common.
        manifest: The list of the jobs, with the stacks that they were in.
        jobs: The jobs with their configs.
        failed: Jobs that failed are to be run as well.
    """
    histories = {job.number: RunHistory.of(job.folder) for job in jobs}
    unfinished = {n for n, history in histories.items() if not history.is_over}
    again = [job for job in jobs if histories[job.number].status == "FAILED"]
    finished = len(jobs) - len(unfinished) - len(again)
    to_run = len(unfinished) + (len(again) if failed else 0)
    reporter = setup.reporter()
    reporter.line(
        f"sweep in {setup.folder}: {finished} of {count_of(len(jobs), 'job')} finished; "
        f"{to_run} to run, from where they stopped"
    )
    if again and not failed:
        reporter.line(f"{len(again)} that failed would be run again with --failed")
    by_number = {job.number: job for job in jobs}
    numbers = manifest.stacks or [[job.number] for job in jobs]
    stacks = [[by_number[n] for n in stack] for stack in numbers if unfinished & set(stack)]
    return [stacks, [[job] for job in again] if failed else []]


def _conduct(
    setup: SweepSetup,
    manifest: Manifest,
    config: Config,
    uploader: Uploader,
    launch: Callable[[], Results],
) -> SweepResult:
    """Run the jobs of a sweep under its parent run, and report on them.

    Args:
        setup: What the jobs have in common.
        manifest: The jobs.
        config: The config of one of them, for what all have in common.
        uploader: Uploads their records; it is closed with the sweep.
        launch: Trains the jobs.
    """
    failure = ""
    with _opened(setup, manifest, config, uploader) as sweep:
        try:
            sweep.results.update(launch())
        except Exception as error:  # the launcher itself
            failure = f"the launcher failed: {first_line(error)}"
        signals.check()
        summary = finish.finish_sweep(sweep, failure)
        failure = failure or summary.failure
        with signals.deferred():  # an end is an end
            sweep.parent.end("FAILED" if failure else "FINISHED", failure)
    return SweepResult(
        run_id_of(setup.folder),
        setup.store_uri,
        setup.folder,
        summary,
        None if summary.chosen is None else setup.folder / BEST,
        failure,
        uploaded=not sweep.uploader.pending(),
    )


@contextlib.contextmanager
def _opened(
    setup: SweepSetup, manifest: Manifest, config: Config, uploader: Uploader
) -> Iterator[finish.OpenSweep]:
    """Open the parent run and the uploader of a sweep; end both, whatever is raised meanwhile.

    The arguments are those of `_conduct`. Raise RunFailed if the report cannot be made.
    """
    folder, reporter, patience = setup.folder, setup.reporter(), INTERRUPTED_SECONDS
    with signals.deferred():  # what is opened has to be closed again
        try:
            parent = finish.open_parent(setup, manifest, config)
        except OSError as error:  # before its record had begun
            raise record_failure(folder, error) from error
        (folder / STOP).unlink(missing_ok=True)  # of an earlier try, which is over
        uploader.open(setup.store_uri, open_runs_at(paths.output_root()), reporter.line)
        uploader.watch([folder, *(job.folder for job in manifest.valid)])
    sweep = finish.OpenSweep(setup, manifest, parent, uploader, reporter)
    try:
        signals.check()
        yield sweep
        patience = config.tracking.flush_seconds
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(str(folder))  # that can be resumed
        try:
            finish.finish_sweep(sweep, "interrupted")
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
        uploader.close(patience)
        run_on_end(config.tracking.on_end, folder, finish.outcome_of(folder))


# checks


def _check_launcher_options(launcher: DictConfig) -> None:
    """Raise ConfigError for an option of a launcher that cannot be."""
    max_stack = launcher.get("max_stack")
    if max_stack is not None and max_stack < 1:
        raise ConfigError(f"hydra.launcher.max_stack={max_stack}: must be 1 or more, or null")
    if launcher.get("n_jobs") == 0:
        raise ConfigError("hydra.launcher.n_jobs=0: must be 1 or more, or -1 for all processors")


def check(jobs: Sequence[SweepJob], settings: SweepConfig) -> None:
    """Build what every job asks for, and note the problem of those that cannot be run.

    Raise ConfigError for the first of those, unless they are to be skipped.
    """
    first_with: dict[str, SweepJob] = {}  # identity of a config -> job
    places = set()
    for job in jobs:
        try:
            job.checked = None if job.problem else check_job(job)
        except ConfigError as error:
            job.problem = str(error)
        if not job.problem:
            tracking = job.run.config.tracking
            places.add((store_uri(tracking.uri, paths.output_root()), tracking.experiment))
            if len(places) > 1:
                raise ConfigError(
                    f"{job.describe()}: tracking.uri and tracking.experiment cannot be swept: "
                    f"a sweep is one object, in one experiment"
                )
            twin = first_with.setdefault(identity(job.run.task_config), job)
            if twin is not job:
                job.problem = f"the same as {twin.describe()}; its result would be the same as well"
        raise_if_invalid(job, settings)


def _check_unchanged(jobs: Sequence[SweepJob], setup: SweepSetup) -> None:
    """Raise ConfigError if a job cannot be resumed, or began with another config."""
    check(jobs, replace(setup.settings, skip_invalid=True))
    for job in jobs:
        if job.problem:
            raise ConfigError(f"{job.describe()}: {job.problem}")
        try:
            check_unchanged(job.run, RunHistory.of(job.folder))
        except ConfigError as error:
            raise ConfigError(f"{setup.folder / CONFIGS}, {job.describe()}: {error}") from error


# folders


def _choose_folders(master: DictConfig, jobs: Sequence[SweepJob]) -> Path:
    """Return the sweep's folder, and give each job its own in there; create none.

    Raise ConfigError for a folder that cannot be made, and for one that two jobs would share.
    """
    name = str(master.hydra.sweep.dir)
    if not name.strip():
        raise ConfigError("hydra.sweep.dir=: must be a folder of its own for the sweep's output")
    folder = Path(name).resolve()
    check_output_folder(folder, "hydra.sweep.dir")
    owners: dict[Path, SweepJob] = {}
    for job in jobs:
        try:
            job.folder = _choose_folder(folder, job)
        except OmegaConfBaseException as error:
            raise ConfigError(f"hydra.sweep.subdir: {str(error).splitlines()[0]}") from error
        if (other := owners.setdefault(job.folder, job)) is not job:
            raise ConfigError(
                f"hydra.sweep.subdir: {other.describe()} and {job.describe()} would share the "
                f"folder {job.folder}. Leave it out, or refer to the job: "
                f"hydra.sweep.subdir='${{hydra.job.num}}'"
            )
    return folder


def _choose_folder(sweep: Path, job: SweepJob) -> Path:
    """Return the output folder of a job, which its config is told."""
    hydra = job.config.hydra
    with read_write(job.config), open_dict(job.config):
        hydra.job.num = hydra.job.id = job.number
        hydra.sweep.dir = str(sweep)
        HydraConfig.instance().set_config(job.config)  # for what its folder's name may refer to
        folder = sweep / str(hydra.sweep.subdir)
        with read_write(hydra.runtime):
            hydra.runtime.output_dir = str(folder)
    return folder


def _write_folder(master: DictConfig, folder: Path, manifest: Manifest) -> None:
    """Create a sweep's folder, with the files that list its jobs. Raise ConfigError."""
    with open_dict(master):
        master.hydra.sweep.dir = str(folder)  # a time in it is now
        if (n_jobs := master.hydra.launcher.get("n_jobs")) is not None:
            # no process for nothing
            master.hydra.launcher.n_jobs = min(n_jobs, len(manifest.valid))
    with new_output_folder(folder, "hydra.sweep.dir"):
        OmegaConf.save(master, folder / "multirun.yaml")
        manifest.save_configs(folder)
        manifest.save(folder)
