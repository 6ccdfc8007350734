"""Runs, from their composed configs to their records: alone, or together as a stack."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mnist_exp.config import paths
from mnist_exp.config.schema import identity
from mnist_exp.config.validate import checkpoint_every
from mnist_exp.data import dataset as data
from mnist_exp.errors import RunFailed, Terminated
from mnist_exp.runs import saved_model as saved
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import Job, Load, prepare
from mnist_exp.runs.recorder import (
    CURVES,
    Result,
    RunRecorder,
    ask_git,
    check_folder,
    check_vacant,
    common_tags,
    record_curves,
    record_first,
    record_model,
    record_predictions,
    record_test,
    write_configs,
)
from mnist_exp.system import signals
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.tracking.run_log import RunHistory, RunWriter, open_runs_at
from mnist_exp.tracking.store import UploadState, check_store
from mnist_exp.tracking.upload import Uploader
from mnist_exp.training import loop as training
from mnist_exp.training.compile import worth_compiling
from mnist_exp.training.events import Epoch, Message, Progress
from mnist_exp.training.models import DeployedModel
from mnist_exp.training.stack import Stack

INTERRUPTED_SECONDS = 3.0  # that somebody who has asked a run to end waits for MLflow
THREADS = torch.get_num_threads()  # torch's choice, before any run makes its own


def train_composed(composed: DictConfig, reporter: Reporter) -> Result:
    """One run, from its composed config. Raises as `api.train` does."""
    job, folder = prepare(composed), Path(composed.hydra.run.dir)
    own = job.config.tracking
    check_store(job.store_uri, own.experiment, own.required)
    check_folder(folder)
    check_vacant(folder)
    return conduct(job, folder, reporter)


def conduct(
    job: Job, folder: Path, reporter: Reporter, *, resume: bool = False, finished: bool = True
) -> Result:
    """One run, its record delivered to MLflow while it is trained."""
    uploader = Uploader(job.store_uri, job.open_runs, reporter.line)
    uploader.watch([folder])
    uploader.start()
    patience = INTERRUPTED_SECONDS
    try:
        (outcome,) = execute([job], [folder], reporter, resume=resume, finished=finished)
        patience = job.config.tracking.flush_seconds
    except (KeyboardInterrupt, Terminated) as error:
        if RunHistory.of(folder).key:
            error.add_note(str(folder))  # that can be resumed
        raise
    finally:
        undelivered = uploader.close(patience)
    if isinstance(outcome, Exception):
        raise outcome
    return replace(outcome, run_id=name_of(folder), delivered=not undelivered)


def name_of(folder: Path) -> str:
    """MLflow's id of a run, or, until MLflow has it, the key of its record."""
    return UploadState.of(folder).run_id or RunHistory.of(folder).key


def execute(
    jobs: Sequence[Job],
    folders: Sequence[Path],
    reporter: Reporter,
    *,
    tags: Sequence[Mapping[str, str]] = ({},),
    parent: Path | None = None,
    place: Path | None = None,
    finished: bool = True,
    threads: int = THREADS,
    resume: bool = False,
) -> list[Result | Exception]:
    """Trains jobs that can share a stack, and keeps the record of each in its folder.

    Returns what each has come to. A job that fails leaves the others as they are; what stops the
    stack of several itself is raised, and leaves their records open.
    `tags`: for each run, beyond its own. `parent`: the folder of the sweep they belong to.
    `place`: the folder of the stack's checkpoints, if not the first job's. Not `finished`: `finish`
    is left for later. `threads`: unless the config says. `resume`: from the newest checkpoint.
    """
    first, place = jobs[0], place or folders[0]
    for folder in folders:
        check_folder(folder)
    torch.set_num_threads(first.config.training.threads or threads)
    dataset = first.load(first.config.dataset).to(first.device)
    facts, diff = common_tags(first, len(jobs)), ask_git("diff", "HEAD")
    for job, folder in zip(jobs, folders, strict=True):
        if not (folder / journal.NAME).exists():  # else they are what the run is resumed from
            write_configs(job, folder)
    state = _newest_state(jobs, place, reporter) if resume else None
    if state is not None:  # as many as before: they decide the order of sums
        torch.set_num_threads(state["threads"])
    records: list[RunRecorder] = []
    try:
        with signals.deferred():
            for job, folder, own in zip(jobs, folders, tags, strict=True):
                told = facts | dict(own)
                story = RunHistory.of(folder) if resume and len(jobs) > 1 else RunHistory()
                # one that had ended before the others of its stack were interrupted stays as it is
                ended = story.status in ("FINISHED", "FAILED")
                make = RunRecorder.of_ended if ended else RunRecorder
                record = make(job, folder, told, diff, parent=parent, finished=finished)
                records.append(record)
            stack = Stack(first.build, [job.config.seed for job in jobs], first.device)
            _train(stack, dataset, records, reporter, place, state)
    except (KeyboardInterrupt, Terminated):
        reporter.stop()
        for _, record in _open(records):
            with record:
                record.close("KILLED", "interrupted")
        raise
    except (Exception, SystemExit) as raised:  # a model can raise anything
        reporter.stop()
        error = raised if isinstance(raised, Exception) else _ended(raised)
        if len(jobs) > 1 and not isinstance(error, RunFailed):
            for _, record in _open(records):
                record.leave()
            raise error from None  # it has its own cause
        for _, record in _open(records):
            record.fail(error)
        if len(records) < len(jobs):
            raise
    return [record.outcome for record in records]


def _newest_state(jobs: Sequence[Job], place: Path, reporter: Reporter) -> Mapping[str, Any] | None:
    """What the newest checkpoint that is whole, and these jobs', holds."""
    own = [identity(job.asked) for job in jobs]
    state, problems = checkpoint.newest(
        place, lambda found: "" if found.get("configs") == own else "it is of another run"
    )
    for problem in problems:
        reporter.line(problem)
    return state


def _ended(raised: BaseException) -> RunFailed:
    error = RunFailed(f"the code of the run ended it: {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error


def _train(
    stack: Stack,
    dataset: data.Dataset,
    records: Sequence[RunRecorder],
    reporter: Reporter,
    place: Path,
    state: Mapping[str, Any] | None,
) -> None:
    jobs = [record.job for record in records]
    own = jobs[0].config.training
    every = checkpoint_every(own.checkpoint_every)
    for k, record in _open(records):
        with record:
            record.start(dataset, stack, k)
    if state is not None:
        for record, own_state in zip(records, state["records"], strict=True):
            with record:
                record.restore(own_state)

    def save(event: Progress | Epoch, steps: int) -> None:
        core = event.state()
        kept = {
            "configs": [identity(job.asked) for job in jobs],
            "records": [record.state() for record in records],
            "threads": torch.get_num_threads(),
            "core": core,
        }
        place.mkdir(parents=True, exist_ok=True)
        try:
            checkpoint.save_numbered(place, steps, kept)
        except OSError as error:
            before = "the one before it is" if any(place.glob("state-*.pt")) else "no other is"
            raise RunFailed(
                f"the checkpoint cannot be written to {place} ({error.strerror}); {before} there"
            ) from error

    reporter.start([job.name for job in jobs], str(stack.device), own.epochs)
    in_an_epoch = -(-len(dataset.train) // own.batch_size)
    saved = 0 if state is None else state["core"]["epoch"] * in_an_epoch + state["core"]["steps"]
    for event in training.fit(
        stack,
        dataset,
        [job.run for job in jobs],
        jobs[0].optimizer,
        epochs=own.epochs,
        batch_size=own.batch_size,
        compiled=compiles(jobs, len(dataset.train))
        and (stack.is_traceable or own.compile == "always"),
        state=None if state is None else state["core"],
    ):
        if isinstance(event, Progress):
            reporter.progress(event)
            if event.epoch == 1 and event.step == len(event.losses):
                for k, record in _open(records):
                    with record:
                        record.take_first(event.losses[:, event.active.index(k)])
            done = (event.epoch - 1) * in_an_epoch + event.step
            due = every.steps and done - saved >= every.steps
            if event.step < event.steps and (due or signals.asked()):
                save(event, done)
                saved = done
                signals.check()
            continue
        for k, record in _open(records):  # first: what a person has seen is kept
            with record:
                record.take(event, k, dataset)
        if isinstance(event, Message):
            reporter.line(event.text)
            continue
        reporter.epoch(event)
        due = event.epoch == own.epochs or (every.epochs and event.epoch % every.epochs == 0)
        # where all have failed, a later try begins with the epoch that they failed in
        if _open(records) and (due or signals.asked()):
            saved = event.epoch * in_an_epoch
            save(event, saved)
        signals.check()
        if not _open(records):
            break
    reporter.stop()
    for k, record in _open(records):
        with record:
            record.end(stack.select([k]), dataset)
            signals.check()


def _open(records: Sequence[RunRecorder]) -> list[tuple[int, RunRecorder]]:
    return [(k, record) for k, record in enumerate(records) if record.is_open]


def compiles(jobs: Sequence[Job], images: int) -> bool:
    """Whether these jobs are to be trained with a compiled step, as a stack that can be traced.

    `images`: in an epoch.
    """
    own = jobs[0].config.training
    if own.compile != "auto":
        return own.compile == "always"
    return worth_compiling(own.epochs * -(-images // own.batch_size), len(jobs), jobs[0].device)


def finish(folder: Path, load: Load) -> dict[str, float]:
    """What `execute` has left for later, of the run whose record is in `folder`: the official test
    set, pictures, the model for MLflow."""
    dataset, stack = saved.recall(folder / "config.yaml", folder / "checkpoint.pt", load)
    writer = RunWriter.reopen(folder, open_runs_at(paths.output_root()))
    story = RunHistory.of(folder)
    history = {key: story.history(key) for key in CURVES}
    epoch = max(step for step, _ in history["train/loss"])
    record_first(dataset, writer)
    test = record_test(stack, dataset, writer, epoch)
    best = story.newest().get("best/epoch")
    if dataset.val is not None:  # the weights are those of the best epoch
        record_predictions(stack, dataset, writer, int(best or epoch))
    record_curves(history, best, story.name, test["test/accuracy"], writer)
    served = DeployedModel(stack.model(0), dataset.mean, dataset.std).eval()
    record_model(served, dataset, writer, epoch)
    writer.metrics(test, epoch)
    writer.journal.close()
    return test
