"""Training: `train` trains one run, `train_stack` the runs that can share a stack."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnist_exp.config import paths
from mnist_exp.config.schema import identity
from mnist_exp.config.validate import checkpoint_every
from mnist_exp.errors import RunFailed, Terminated
from mnist_exp.run.console import Reporter
from mnist_exp.run.folder import check_output_folder, check_registry, check_vacant, write_configs
from mnist_exp.run.job import Job
from mnist_exp.run.on_end import run_on_end
from mnist_exp.run.provenance import ask_git, check_names, stack_tags
from mnist_exp.run.recorder import (
    Event,
    Result,
    RunRecorder,
    StackPlan,
    closing_on_error,
    open_recorders,
    record_failure,
)
from mnist_exp.system import garbage, signals
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.tracking.address import store_uri
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import open_runs_at
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.upload import UploadState
from mnist_exp.tracking.uploader import Uploader
from mnist_exp.training import loop
from mnist_exp.training.compile import worth_compiling
from mnist_exp.training.events import Epoch, Message, Progress
from mnist_exp.training.stack import Stack

INTERRUPTED_SECONDS = 3.0  # that somebody who has asked a run to end waits for MLflow
NO_RECORD: dict[str, Any] = {"history": [], "best": {}}  # as `RunRecorder.state`


class LastEpochReached(RunFailed):
    """Training ended before its last epoch, where its caller wanted no more."""


def train(
    job: Job,
    folder: Path,
    reporter: Reporter,
    uploader: Uploader,
    *,
    store: str | None = None,
    resume: bool = False,
    defer_test: bool = False,
    last_epoch: int | None = None,
) -> Result:
    """Train one run, whose record is uploaded to MLflow meanwhile.

    Args:
        job: The run.
        folder: Its output folder.
        reporter: Shows how it gets on.
        uploader: Uploads the record; it is closed with the run.
        store: The URI of the store to upload to, if it is not the config's.
        resume: Go on with the run in `folder` from its newest checkpoint.
        defer_test: Leave the test set and the model to `record_deferred_test`.
        last_epoch: The last one that the run to be reproduced has recorded, if not all; training
            ends after it, with LastEpochReached.

    Raises:
        ConfigError: The run cannot be recorded there. Nothing has been created.
        RunFailed: The run does not reach its end.
    """
    tracking = job.config.tracking
    uri = store or store_uri(tracking.uri, paths.output_root())
    open_runs = open_runs_at(paths.output_root())
    check_registry(open_runs)
    if not resume:
        check_names(job)
        check_store(uri, tracking.experiment, tracking.required)
        check_output_folder(folder)
        check_vacant(folder)
    plan = StackPlan([job], [folder], uri, open_runs, defer_test=defer_test)
    uploader.open(uri, open_runs, reporter.line)
    uploader.watch([folder])
    flush_seconds = INTERRUPTED_SECONDS
    try:
        (outcome,) = train_stack(plan, reporter, resume=resume, last_epoch=last_epoch)
        flush_seconds = tracking.flush_seconds
    except OSError as error:  # before the record had begun
        raise record_failure(folder, error) from error
    except (KeyboardInterrupt, Terminated) as error:
        if RunHistory.of(folder).key:
            error.add_note(str(folder))  # that can be resumed
        raise
    finally:
        pending = uploader.close(flush_seconds)
        run_on_end(tracking.on_end, folder)
    if isinstance(outcome, Exception):
        raise outcome
    return replace(outcome, run_id=run_id_of(folder), uploaded=not pending)


def run_id_of(folder: Path) -> str:
    """Return MLflow's id of a run, or, until MLflow has it, the key of its record."""
    return UploadState.of(folder).run_id or RunHistory.of(folder).key


def train_stack(
    plan: StackPlan, reporter: Reporter, *, resume: bool = False, last_epoch: int | None = None
) -> list[Result | Exception]:
    """Train the runs of a stack, and return the outcome of each that had not ended before.

    A run that fails leaves the others as they are; what stops the stack of several itself is
    raised, and leaves their records open.

    Args:
        plan: The runs, and where their records go.
        reporter: Shows how they get on.
        resume: Go on from the newest checkpoint; a run that had ended before stays as it is.
        last_epoch: As for `train`; LastEpochReached is the outcome then.
    """
    jobs, first = plan.jobs, plan.jobs[0]
    settings = first.config.training
    for folder in plan.folders:
        check_output_folder(folder, key="" if resume else "hydra.run.dir")
    torch.set_num_threads(settings.threads or plan.threads)
    dataset = first.load(first.config.dataset).to(first.device)
    tags, diff = stack_tags(first, len(jobs)), ask_git("diff", "HEAD")
    for job, folder in zip(jobs, plan.folders, strict=True):
        if not (folder / journal.NAME).exists():  # else they are what the run is resumed from
            write_configs(job, folder)
    checkpointer = Checkpointer(plan, len(dataset.train))
    state = checkpointer.load_newest(reporter) if resume else None
    if state is not None:  # as many as before: they decide the order of sums
        torch.set_num_threads(state["threads"])
    recorders: list[RunRecorder] = []
    garbage.collect_as_usual()
    with closing_on_error(recorders, len(jobs)), signals.deferred():
        for k in _unfinished(plan) if resume else range(len(jobs)):
            recorders.append(RunRecorder(plan, k, dataset, tags))
        stack = Stack(first.build, [job.config.seed for job in jobs], first.device, first.precision)
        for recorder in recorders:
            with recorder.failing_alone():
                recorder.start(stack, diff)
                if state is not None:
                    recorder.restore(state["records"][recorder.index])
        compiled = should_compile(jobs, len(dataset.train))
        events = loop.fit(
            stack,
            dataset,
            [job.run_spec for job in jobs],
            first.stack_spec,
            compiled=compiled and (stack.is_traceable or settings.compile == "always"),
            state=None if state is None else state["core"],
        )
        reporter.start([job.name for job in jobs], str(stack.device), settings.epochs)
        try:
            _follow(events, recorders, checkpointer, reporter, last_epoch)
        finally:
            reporter.stop()
        for recorder in open_recorders(recorders):
            with recorder.failing_alone():
                recorder.end(stack.select([recorder.index]), reporter)
                signals.check()
    return [recorder.outcome for recorder in recorders]


def _unfinished(plan: StackPlan) -> list[int]:
    """Return the numbers of the runs to go on with: of several, those that have not ended."""
    if len(plan.folders) == 1:
        return [0]
    return [k for k, folder in enumerate(plan.folders) if not RunHistory.of(folder).is_over]


def _follow(
    events: Iterable[Event],
    recorders: Sequence[RunRecorder],
    checkpointer: "Checkpointer",
    reporter: Reporter,
    last_epoch: int | None,
) -> None:
    """Record, show and checkpoint what training yields, until no run is left to be trained.

    Raises:
        LastEpochReached: After epoch `last_epoch`.
        KeyboardInterrupt, Terminated: A signal has come, after a checkpoint.
    """
    for event in events:
        for recorder in open_recorders(recorders):  # first: what a person has seen is kept
            with recorder.failing_alone():
                recorder.record(event)
        if isinstance(event, Message):
            reporter.line(event.text)
            continue
        if isinstance(event, Progress):
            reporter.progress(event)
        else:
            reporter.epoch(event)
        is_left = bool(open_recorders(recorders))
        if checkpointer.is_due(event):
            if is_left:  # where all have failed, a later try begins with the epoch they failed in
                checkpointer.save(event, recorders)
            signals.check()
        if isinstance(event, Epoch) and not is_left:
            return
        if isinstance(event, Epoch) and event.epoch == last_epoch:
            raise LastEpochReached(f"the first run has recorded no more than {last_epoch} epochs")


class Checkpointer:
    """The numbered checkpoints of a stack, from which its training can go on."""

    def __init__(self, plan: StackPlan, images: int) -> None:
        """Take the checkpoints that are in the folder of a plan. `images`: to train on."""
        settings = plan.jobs[0].config.training
        self.folder = plan.checkpoint_dir or plan.folders[0]
        self.configs = [identity(job.task_config) for job in plan.jobs]
        self.every, self.epochs = checkpoint_every(settings.checkpoint_every), settings.epochs
        self.sizes = plan.jobs[0].stack_spec.epoch_sizes(images)
        self.saved = 0  # after so many steps

    def load_newest(self, reporter: Reporter) -> dict[str, Any] | None:
        """Return the newest state that is whole and of these runs; say which ones are not."""
        state, problems = checkpoint.newest(
            self.folder,
            lambda state: "" if state.get("configs") == self.configs else "it is of another run",
        )
        for problem in problems:
            reporter.line(problem)
        if state is not None:
            core = state["core"]
            self.saved = self.sizes.steps_before(core["epoch"] + 1) + core["steps"]
        return state

    def is_due(self, event: Progress | Epoch) -> bool:
        """Return whether to save after an event: at the set intervals, or for a signal."""
        if isinstance(event, Progress) and event.step == event.steps:
            return False  # the end of the epoch comes next
        is_due = signals.received()
        if isinstance(event, Epoch):
            at_epochs = self.every.epochs and event.epoch % self.every.epochs == 0
            is_due |= bool(at_epochs) or event.epoch == self.epochs
        steps = self._steps(event) - self.saved
        return is_due or bool(self.every.steps and steps >= self.every.steps)

    def save(self, event: Progress | Epoch, recorders: Sequence[RunRecorder]) -> None:
        """Save what training and its recorders need to go on. Raise RunFailed if it cannot be."""
        records = {recorder.index: recorder.state() for recorder in recorders}
        state = {
            "configs": self.configs,
            # a run that had ended before is never gone on with
            "records": [records.get(k, NO_RECORD) for k in range(len(self.configs))],
            "threads": torch.get_num_threads(),
            "core": event.state(),
        }
        self.saved = self._steps(event)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.save_numbered(self.folder, self.saved, state)
        except OSError as error:
            there = any(self.folder.glob("state-*.pt"))
            raise RunFailed(
                f"the checkpoint cannot be written to {self.folder} ({error.strerror}); "
                f"{'the one before it is' if there else 'no other is'} there"
            ) from error

    def _steps(self, event: Progress | Epoch) -> int:
        """Return how many steps are done."""
        if isinstance(event, Epoch):
            return self.sizes.steps_before(event.epoch + 1)
        return self.sizes.steps_before(event.epoch) + event.step


def should_compile(jobs: Sequence[Job], images: int) -> bool:
    """Return whether the step of these jobs is to be compiled. `images`: to train on."""
    settings = jobs[0].config.training
    if settings.compile != "auto":
        return settings.compile == "always"
    steps = jobs[0].stack_spec.epoch_sizes(images).total_steps
    return worth_compiling(steps, len(jobs), jobs[0].device, jobs[0].has_convolutions)
