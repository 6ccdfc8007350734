"""Runs, from their composed configs to their records: alone, or together as a stack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mnist_exp import checkpoint, data, plots, training
from mnist_exp import config as configs
from mnist_exp.config import Config
from mnist_exp.console import Reporter
from mnist_exp.errors import ConfigError, RunFailed, Terminated
from mnist_exp.job import Job, Load, load_dataset, prepare
from mnist_exp.models import Served
from mnist_exp.record import (
    Record,
    Result,
    ask_git,
    check_folder,
    common_tags,
    first_images,
    record_first,
    record_predictions,
    record_test,
    served_as,
    write_configs,
)
from mnist_exp.stack import Stack
from mnist_exp.step import compiling_pays
from mnist_exp.tracking import Store, Tracker

THREADS = torch.get_num_threads()  # torch's choice, before any run makes its own


def train(overrides: Sequence[str] = (), reporter: Reporter | None = None) -> Result:
    """Trains one run: `train(["model=cnn", "training.epochs=2"])`.

    The overrides are those of the command line, which is a thin layer over this function. Raises
    ConfigError, with nothing created, if the run cannot be what was asked for, and RunFailed if it
    does not reach its end.
    """
    return train_composed(configs.compose(overrides), reporter or Reporter())


def train_composed(composed: DictConfig, reporter: Reporter) -> Result:
    """`train`, from a config that is composed already."""
    folder = Path(composed.hydra.run.dir)
    (outcome,) = execute([prepare(composed)], [folder], reporter)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def execute(
    jobs: Sequence[Job],
    folders: Sequence[Path],
    reporter: Reporter,
    *,
    tags: Sequence[Mapping[str, str]] = ({},),
    finished: bool = True,
    threads: int = THREADS,
) -> list[Result | Exception]:
    """Trains jobs that can share a stack, and keeps the record of each in its folder and in MLflow.

    Returns what each has come to. A job that fails leaves the others as they are; what stops the
    stack of several itself ends all of them, leaves no runs, and is raised.
    `tags`: for each run, beyond its own. `threads`: unless the config says. Not `finished`:
    `finish` is left for later.
    """
    first = jobs[0]
    for folder in folders:
        check_folder(folder)
    torch.set_num_threads(first.config.training.threads or threads)
    store = Store(first.store_uri)
    experiment = store.experiment(first.config.tracking.experiment)
    dataset = first.load(first.config.dataset).to(first.device)
    facts, diff = common_tags(first, len(jobs)), ask_git("diff", "HEAD")
    for job, folder in zip(jobs, folders, strict=True):
        write_configs(job, folder)
    records: list[Record] = []
    try:
        for job, folder, own in zip(jobs, folders, tags, strict=True):
            record = Record(job, folder, store, experiment, facts | dict(own), diff, finished)
            records.append(record)
        stack = Stack(first.build, [job.config.seed for job in jobs], first.device)
        _train(stack, dataset, records, reporter)
    except (KeyboardInterrupt, Terminated):
        reporter.stop()
        for record in records:
            record.close("KILLED", "interrupted")
        raise
    except (Exception, SystemExit) as raised:  # a model can raise anything
        reporter.stop()
        error = raised if isinstance(raised, Exception) else _ended(raised)
        if len(records) == len(jobs) == 1:
            records[0].fail(error)
        else:
            for record in records:
                record.discard()
            raise error from None  # it has its own cause
    return [record.outcome for record in records]


def _ended(raised: BaseException) -> RunFailed:
    error = RunFailed(f"the code of the run ended it: {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error


def _train(
    stack: Stack, dataset: data.Dataset, records: Sequence["Record"], reporter: Reporter
) -> None:
    jobs = [record.job for record in records]
    own = jobs[0].config.training
    for _, record in _open(records):
        with record:
            record.start(dataset)
    names = [f"run {r.tracker.run_id[:8]}  {r.job.name}" for r in records]
    reporter.start(names, str(stack.device), own.epochs)
    for event in training.fit(
        stack,
        dataset,
        [job.run for job in jobs],
        jobs[0].optimizer,
        epochs=own.epochs,
        batch_size=own.batch_size,
        compiled=compiles(jobs, len(dataset.train))
        and (stack.traceable or jobs[0].config.training.compile == "always"),
    ):
        if isinstance(event, training.Progress):
            reporter.progress(event)
            continue
        for k, record in _open(records):  # first: what a person has seen is kept
            with record:
                record.take(event, k, dataset)
        if isinstance(event, training.Notice):
            reporter.line(event.text)
        else:
            reporter.epoch(event)
        if not _open(records):
            break
    reporter.stop()
    for k, record in _open(records):
        with record:
            record.end(stack.take([k]), dataset)


def _open(records: Sequence["Record"]) -> list[tuple[int, "Record"]]:
    return [(k, record) for k, record in enumerate(records) if record.is_open]


def compiles(jobs: Sequence[Job], images: int) -> bool:
    """Whether these jobs are to be trained with a compiled step, as a stack that can be traced.

    `images`: in an epoch.
    """
    own = jobs[0].config.training
    if own.compile != "auto":
        return own.compile == "always"
    return compiling_pays(own.epochs * -(-images // own.batch_size), len(jobs), jobs[0].device)


def show(overrides: Sequence[str], output: Path | None) -> str:
    """Draws the dataset's first images to a PNG. Returns its facts and the path, to be printed."""
    config = configs.validate(configs.task_config(configs.compose(overrides)))
    path = output or configs.output_root() / "outputs" / f"{config.dataset.name}.png"
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--output {path}: must end in .png, .svg or .pdf")
    dataset = load_dataset(config.dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.grid(**first_images(dataset)), path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from error
    channels, height, width = dataset.shape
    val = f", {len(dataset.val):,} validation" if dataset.val is not None else ""
    return "\n".join(
        [
            f"dataset  {dataset.name} ({dataset.source})",
            f"images   {len(dataset.train):,} training{val}, {len(dataset.test):,} test",
            f"size     {channels} x {height} x {width}, 8 bits a pixel",
            f"classes  {len(dataset.classes)}: {', '.join(dataset.classes)}",
            f"pixels   mean {dataset.mean:.4f}, std {dataset.std:.4f} (training images, 0 to 1)",
            f"picture  {path}",
        ]
    )


@dataclass(frozen=True)
class Evaluation:
    """A saved model on the official test set."""

    run_id: str
    name: str
    test: dict[str, float]
    recorded: dict[str, float]  # what the run itself had found


def evaluate(store: Store, found: Any) -> Evaluation:
    """The saved model of a run, as `store.find` gives it, on the official test set."""
    _, dataset, stack = _recall(store, found, load_dataset)
    logits = training.predict(stack, dataset, dataset.test)
    (test,) = training.score(logits, dataset.test, "test")
    known = {key: value for key, value in found.data.metrics.items() if key in test}
    return Evaluation(found.info.run_id, found.info.run_name, test, known)


def finish(store: Store, found: Any, load: Load) -> dict[str, float]:
    """What `execute` has left for later: the official test set, pictures, the model in MLflow."""
    _, dataset, stack = _recall(store, found, load)
    run_id = found.info.run_id
    tracker = Tracker(store, run_id)
    keys = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
    history = {key: store.history(run_id, key) for key in keys}
    epoch = max(step for step, _ in history["train/loss"])
    record_first(dataset, tracker)
    test = record_test(stack, dataset, tracker, epoch)
    best = found.data.metrics.get("best/epoch")
    if dataset.val is not None:  # the weights are those of the best epoch
        record_predictions(stack, dataset, tracker, int(best or epoch))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        best_epoch = None if best is None else int(best)
        figure = plots.curves(history, best_epoch, found.info.run_name, test["test/accuracy"])
        plots.save(figure, path)
        tracker.artifact(path)
    served = Served(stack.model(0), dataset.mean, dataset.std).eval()
    tracker.model(served, *served_as(dataset))
    tracker.flush()
    return test


def _recall(store: Store, found: Any, load: Load) -> tuple[Config, data.Dataset, Stack]:
    """A run's config, its data set, and its saved model as a stack of one, on the CPU."""
    with TemporaryDirectory() as folder:
        recorded = OmegaConf.load(store.fetch(found.info.run_id, "config.yaml", Path(folder)))
        path = store.fetch(found.info.run_id, "checkpoint", Path(folder)) / "checkpoint.pt"
        state = checkpoint.load(path)["model"]
    assert isinstance(recorded, DictConfig)
    config = configs.validate(recorded)
    dataset = load(config.dataset)
    stack = Stack(
        configs.build_model(config, dataset.shape, len(dataset.classes)),
        [config.seed],
        torch.device("cpu"),
    )
    shapes = [{n: t.shape for n, t in s.items()} for s in (state, stack.module.state_dict())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"run {found.info.run_id}: its checkpoint does not fit {config.model['_target_']} as "
            f"it is now: the code has changed since"
        )
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in state.items()})
    return config, dataset, stack
