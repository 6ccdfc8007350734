"""Runs, from their composed configs to their records: alone, or together as a stack."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mnist_exp import checkpoint, data, journal, saved, signals, training
from mnist_exp import config as configs
from mnist_exp.console import Reporter
from mnist_exp.courier import Courier
from mnist_exp.errors import RunFailed, Terminated
from mnist_exp.job import Job, Load, prepare
from mnist_exp.models import Served
from mnist_exp.record import (
    CURVES,
    Record,
    Result,
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
from mnist_exp.stack import Stack
from mnist_exp.step import compiling_pays
from mnist_exp.tracker import Story, Tracker, index_at
from mnist_exp.tracking import Delivered, check_store

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
    courier = Courier(job.store_uri, job.index, reporter.line)
    courier.watch([folder])
    courier.start()
    patience = INTERRUPTED_SECONDS
    try:
        (outcome,) = execute([job], [folder], reporter, resume=resume, finished=finished)
        patience = job.config.tracking.flush_seconds
    except (KeyboardInterrupt, Terminated) as error:
        if Story.of(folder).key:
            error.add_note(str(folder))  # that can be resumed
        raise
    finally:
        undelivered = courier.close(patience)
    if isinstance(outcome, Exception):
        raise outcome
    return replace(outcome, run_id=name_of(folder), delivered=not undelivered)


def name_of(folder: Path) -> str:
    """MLflow's id of a run, or, until MLflow has it, the key of its record."""
    return Delivered.of(folder).run_id or Story.of(folder).key


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
    records: list[Record] = []
    try:
        with signals.deferred():
            for job, folder, own in zip(jobs, folders, tags, strict=True):
                told = facts | dict(own)
                story = Story.of(folder) if resume and len(jobs) > 1 else Story()
                # one that had ended before the others of its stack were interrupted stays as it is
                ended = story.status in ("FINISHED", "FAILED")
                make = Record.of_ended if ended else Record
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
    own = [configs.identity(job.asked) for job in jobs]
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
    records: Sequence[Record],
    reporter: Reporter,
    place: Path,
    state: Mapping[str, Any] | None,
) -> None:
    jobs = [record.job for record in records]
    own = jobs[0].config.training
    every = configs.checkpoint_every(own.checkpoint_every)
    for k, record in _open(records):
        with record:
            record.start(dataset, stack, k)
    if state is not None:
        for record, own_state in zip(records, state["records"], strict=True):
            with record:
                record.restore(own_state)

    def save(event: training.Progress | training.Epoch, steps: int) -> None:
        core = event.state()
        kept = {
            "configs": [configs.identity(job.asked) for job in jobs],
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
        and (stack.traceable or own.compile == "always"),
        state=None if state is None else state["core"],
    ):
        if isinstance(event, training.Progress):
            reporter.progress(event)
            if event.epoch == 1 and event.step == len(event.losses):
                for k, record in _open(records):
                    with record:
                        record.take_first(event.losses[:, event.runs.index(k)])
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
        if isinstance(event, training.Notice):
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
            record.end(stack.take([k]), dataset)
            signals.check()


def _open(records: Sequence[Record]) -> list[tuple[int, Record]]:
    return [(k, record) for k, record in enumerate(records) if record.is_open]


def compiles(jobs: Sequence[Job], images: int) -> bool:
    """Whether these jobs are to be trained with a compiled step, as a stack that can be traced.

    `images`: in an epoch.
    """
    own = jobs[0].config.training
    if own.compile != "auto":
        return own.compile == "always"
    return compiling_pays(own.epochs * -(-images // own.batch_size), len(jobs), jobs[0].device)


def finish(folder: Path, load: Load) -> dict[str, float]:
    """What `execute` has left for later, of the run whose record is in `folder`: the official test
    set, pictures, the model for MLflow."""
    dataset, stack = saved.recall(folder / "config.yaml", folder / "checkpoint.pt", load)
    tracker = Tracker.reopen(folder, index_at(configs.output_root()))
    story = Story.of(folder)
    history = {key: story.history(key) for key in CURVES}
    epoch = max(step for step, _ in history["train/loss"])
    record_first(dataset, tracker)
    test = record_test(stack, dataset, tracker, epoch)
    best = story.newest().get("best/epoch")
    if dataset.val is not None:  # the weights are those of the best epoch
        record_predictions(stack, dataset, tracker, int(best or epoch))
    record_curves(history, best, story.name, test["test/accuracy"], tracker)
    served = Served(stack.model(0), dataset.mean, dataset.std).eval()
    record_model(served, dataset, tracker, epoch)
    tracker.metrics(test, epoch)
    tracker.journal.close()
    return test
