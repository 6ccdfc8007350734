"""What the package offers to Python: the verbs as functions, each importing what is heavy when it
runs. Overrides are those of the command line; a run is `last`, a run id, or its beginning."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp.errors import ConfigError, Terminated

if TYPE_CHECKING:
    import torch

    from mnist_exp.config.schema import Config
    from mnist_exp.data.dataset import Dataset
    from mnist_exp.runs.evaluate import Evaluation
    from mnist_exp.runs.predict import Prediction
    from mnist_exp.runs.recorder import Result
    from mnist_exp.runs.reproduce import Reproduction
    from mnist_exp.sweeps.ensemble import Ensemble
    from mnist_exp.sweeps.sweep import SweepResult
    from mnist_exp.tracking.store import Store


def load(overrides: Sequence[str] = ()) -> "Dataset":
    """The data set that a run with these overrides would be trained on. Raises ConfigError."""
    config = _config(overrides)  # before torch's seconds of import

    from mnist_exp.runs.job import load_dataset

    return load_dataset(config.dataset)


def _config(overrides: Sequence[str]) -> "Config":
    from mnist_exp.config.compose import compose
    from mnist_exp.config.schema import task_config
    from mnist_exp.config.validate import validate

    return validate(task_config(compose(overrides)))


def build(overrides: Sequence[str] = ()) -> "torch.nn.Module":
    """The model that a run with these overrides would start from. Raises ConfigError."""
    from mnist_exp.config.compose import compose
    from mnist_exp.runs.job import prepare
    from mnist_exp.training.stack import Stack

    job = prepare(compose(overrides))
    return Stack(job.build, [job.config.seed], job.device).model(0)


def train(overrides: Sequence[str] = (), verbose: bool = False) -> "Result":
    """Trains one run: `train(["model=cnn", "training.epochs=2"])`.

    `verbose`: a line is printed for every epoch. Raises ConfigError, with nothing created, if the
    run cannot be what was asked for, and RunFailed if it does not reach its end.
    """
    from mnist_exp.config.compose import compose
    from mnist_exp.runs import train as run
    from mnist_exp.runs.console import Reporter, Terminal
    from mnist_exp.runs.job import prepare

    job = prepare(compose(overrides))
    return run.train(job, job.folder, Terminal() if verbose else Reporter())


def train_sweep(overrides: Sequence[str], verbose: bool = False) -> "SweepResult":
    """Trains a sweep: `train_sweep(["optimizer.lr=0.01,0.1", "seed=0,1"])`.

    `verbose`: its progress and its report are printed. Raises ConfigError, with nothing created,
    if one of its jobs cannot be run. Jobs that fail are in the report.
    """
    from mnist_exp.config.compose import compose_sweep
    from mnist_exp.sweeps import grid

    context, master = compose_sweep(overrides)
    jobs = grid.jobs(context, master)

    from mnist_exp.sweeps import sweep

    return sweep.run_sweep(context, master, jobs, verbose)


def evaluate(run: str = "last", overrides: Sequence[str] = ()) -> "Evaluation":
    """The saved model of a run on the official test set. Raises ConfigError."""
    store, root = open_store(overrides, data=True), moved(overrides)
    found = store.find(run)

    from mnist_exp.runs import evaluate as evaluation

    return evaluation.evaluate(store, found, root)


def ensemble(sweep: str = "last", overrides: Sequence[str] = ()) -> "Ensemble":
    """A sweep's chosen cell, its seeds together, on the official test set. Raises ConfigError."""
    store, root = open_store(overrides, data=True), moved(overrides)
    parent = store.find(sweep, sweep=True)

    from mnist_exp.sweeps import ensemble as ensembles

    return ensembles.ensemble(store, parent, root)


def resume(
    run: str = "last",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    failed: bool = False,
) -> "Result | SweepResult | None":
    """Go on with a run or a sweep that stopped, to the end that it would have had.

    Return what it leaves; None where it had reached its end. Raise ConfigError, with nothing
    changed, if it cannot go on, and RunFailed if it does not reach its end this time.

    Args:
        run: `last`, a run id, its beginning, or the output folder.
        overrides: `tracking.uri=...` alone, the store to look into.
        verbose: print a line for every epoch.
        failed: of a sweep, run also the jobs again that failed.
    """
    uri = store_uri(overrides, required=False)  # before torch's seconds of import

    from mnist_exp.config.paths import output_root
    from mnist_exp.runs import resume as resuming
    from mnist_exp.runs.console import Reporter, Terminal
    from mnist_exp.sweeps import sweep
    from mnist_exp.tracking.run_log import open_runs_at

    folder = resuming.find(run, uri, open_runs_at(output_root()))
    try:
        if sweep.is_sweep(folder):
            return sweep.resume_sweep(folder, failed, verbose)
        return resuming.resume_run(folder, Terminal() if verbose else Reporter())
    except (KeyboardInterrupt, Terminated) as error:
        if not getattr(error, "__notes__", []):  # it had not begun
            error.add_note(str(folder))
        raise


def predict(
    files: Sequence[str | Path],
    run: str = "last",
    overrides: Sequence[str] = (),
    raw: bool = False,
) -> "list[Prediction]":
    """What the saved model of a run says of image files. Raises ConfigError.

    raw: they are light ink on black, as in MNIST, and not to be inverted, cropped and centred.
    """
    from mnist_exp.config.compose import check_list

    check_list("files", files)
    store = open_store(overrides)
    found = store.find(run)

    from mnist_exp.runs import predict as prediction

    return prediction.predict(store, found, [Path(file) for file in files], raw)


def reproduce(
    run: str = "last",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    keep: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> "Reproduction":
    """Trains a run again from its record alone, and compares every epoch.

    `verbose`: a line is printed for every epoch. keep: the store for the second run, which is gone
    otherwise. threads, device: in place of the recorded ones. Raises ConfigError.
    """
    store, root = open_store(overrides, data=True), moved(overrides)
    found = store.find(run)

    from mnist_exp.runs import reproduce as reproduction
    from mnist_exp.runs.console import Reporter, Terminal

    reporter = Terminal() if verbose else Reporter()
    return reproduction.reproduce(
        store, found, reporter, keep=keep, threads=threads, device=device, root=root
    )


def moved(overrides: Sequence[str]) -> str | None:
    """Where a run's data is by now, if an override says so: dataset.root=FOLDER.

    Raises ConfigError.
    """
    from mnist_exp.config.compose import compose

    named = [o for o in overrides if o.startswith("dataset.root=")]
    return compose(named).dataset.root if named else None


def store_uri(overrides: Sequence[str], *, data: bool = False, required: bool = True) -> str:
    """The store to look into, which is nearly all that can be said of a run that is on record.

    Raises ConfigError for overrides that say something else; `required`: also where no server
    answers. `data`: they may say where the run's data is, too.
    """
    from mnist_exp.config import paths
    from mnist_exp.config.compose import check_list
    from mnist_exp.tracking import store as tracking

    check_list("overrides", overrides)
    for override in overrides:
        if not override.startswith(("tracking.uri=", *["dataset.root="] * data)):
            more = ", and dataset.root=FOLDER, where its data is" * data
            raise ConfigError(
                f"{override}: it would change nothing here, as the run is on record. What can be "
                f"said is tracking.uri=..., the store{more}"
            )
    asked = _config(overrides).tracking.uri
    tracking.warn_if_environment_wins(asked)
    uri = tracking.store_uri(asked, paths.output_root())
    tracking.check_store(uri, required=required)
    return uri


def open_store(overrides: Sequence[str] = (), *, data: bool = False) -> "Store":
    """What `store_uri` names, opened, after what was waiting for it has been brought there.

    Raises ConfigError, also where there is no such store yet.
    """
    import logging

    from mnist_exp.config.paths import output_root
    from mnist_exp.tracking import store as tracking
    from mnist_exp.tracking import upload
    from mnist_exp.tracking.run_log import open_runs_at

    uri = store_uri(overrides, data=data)
    _, problems = upload.sync(open_runs_at(output_root()), uri)
    for folder, why in problems.items():
        logging.getLogger(__name__).warning("%s: not in MLflow yet: %s", folder, why)
    if not tracking.has_runs(uri):
        raise ConfigError(f"{uri}: there are no runs yet. To make one: mnist-exp train")
    return tracking.Store(uri)
