"""Experiments from Python: data sets and models, training, and what has been trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_exp.errors import Terminated

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from mnist_exp.config.schema import Config
    from mnist_exp.data.dataset import Dataset
    from mnist_exp.run.evaluate import Evaluation
    from mnist_exp.run.overview import DatasetOverview
    from mnist_exp.run.predict import Prediction
    from mnist_exp.run.recorder import Result
    from mnist_exp.run.reproduce import Reproduction
    from mnist_exp.sweeps.ensemble import Ensemble
    from mnist_exp.sweeps.results import Report
    from mnist_exp.sweeps.sweep import SweepResult


def load(overrides: Sequence[str] = ()) -> "Dataset":
    """Return the data set that a run with these overrides would be trained on.

    Raises:
        ConfigError: An override or the data set is at fault.
    """
    from mnist_exp.config.compose import compose

    config = _config(compose(overrides))  # before torch's seconds of import

    from mnist_exp.run.job import load_dataset

    return load_dataset(config.dataset)


def show(overrides: Sequence[str] = ()) -> "DatasetOverview":
    """Return the facts of a data set and a figure of its first images.

    With an augmentation, the figure is of what a run of these overrides trains on first.

    Raises:
        ConfigError: An override or the data set is at fault, or the augmentation does not fit it.
    """
    from mnist_exp.config.compose import compose

    config = _config(compose(overrides))  # before torch's seconds of import

    from mnist_exp.run.overview import overview

    return overview(config)


def build(overrides: Sequence[str] = ()) -> "torch.nn.Module":
    """Return the model that a run with these overrides would start from. Raise ConfigError."""
    from mnist_exp.config.compose import compose
    from mnist_exp.run.job import prepare
    from mnist_exp.training.stack import Stack

    job = prepare(compose(overrides))
    return Stack(job.build, [job.config.seed], job.device).model(0)


def train(
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    config_name: str = "config",
    config_dir: str | None = None,
) -> "Result":
    """Train one run: `train(["model=cnn", "training.epochs=2"])`.

    Args:
        overrides: What differs from the config of conf/.
        verbose: Print a line for every epoch.
        config_name: The config file to start from, in place of config.yaml.
        config_dir: One more folder of config groups.

    Raises:
        ConfigError: The run cannot be what is asked for. Nothing has been created.
        RunFailed: The run does not reach its end.
    """
    from mnist_exp.config.compose import compose

    return train_composed(compose(overrides, config_name, config_dir), verbose)


def train_composed(composed: "DictConfig", verbose: bool = False) -> "Result":
    """Train one run from its composed config, which has Hydra's own part in it. See `train`."""
    from mnist_exp.config.names import run_name
    from mnist_exp.run.console import reporting
    from mnist_exp.tracking.address import warn_if_environment_wins

    config = _config(composed)
    warn_if_environment_wins(config.tracking.uri)
    name = run_name(config, composed.hydra.runtime.choices)
    with reporting(verbose, f"{name}: loading torch ...") as reporter:  # which takes seconds
        from mnist_exp.tracking.uploader import Uploader

        with Uploader() as uploader:
            from mnist_exp.run.job import prepare, warn
            from mnist_exp.run.train import train

            job = prepare(composed)
            warn([job])
            return train(job, job.folder, reporter, uploader)


def train_sweep(
    overrides: Sequence[str],
    verbose: bool = False,
    *,
    config_name: str = "config",
    config_dir: str | None = None,
) -> "SweepResult":
    """Train a sweep: `train_sweep(["optimizer.lr=0.01,0.1", "seed=0,1"])`.

    Jobs that fail are in its report. The arguments are those of `train`; a verbose sweep prints its
    progress and its report.

    Raises:
        ConfigError: One of the jobs cannot be run. Nothing has been created.
    """
    from mnist_exp.config.compose import compose_sweep
    from mnist_exp.run.console import reporting
    from mnist_exp.sweeps import grid
    from mnist_exp.tracking.address import warn_if_environment_wins

    context, master = compose_sweep(overrides, config_name, config_dir)
    warn_if_environment_wins(master.tracking.uri)
    with reporting(verbose) as reporter:
        jobs = grid.jobs(context, master, reporter)  # before torch's seconds of import

        from mnist_exp.tracking.uploader import Uploader

        with Uploader() as uploader:
            from mnist_exp.sweeps import sweep

            return sweep.run_sweep(context, master, jobs, uploader, reporter)


def resume(
    run: str = "last",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    failed: bool = False,
) -> "Result | SweepResult | None":
    """Go on with a run or a sweep that stopped, to the end that it would have had.

    Return its result; None if it had ended before.

    Args:
        run: A run, a sweep, or the output folder of one.
        overrides: `tracking.uri=...` alone, the store to look into.
        verbose: Print a line for every epoch.
        failed: Of a sweep, run the jobs that failed again.

    Raises:
        ConfigError: It cannot go on. Nothing has been changed.
        RunFailed: It does not reach its end this time.
    """
    from mnist_exp.run import lookup
    from mnist_exp.run.console import reporting

    uri = lookup.store_uri(overrides, required=False)  # before torch's seconds of import
    with reporting(verbose, f"going on with {run}: loading torch ...") as reporter:
        from mnist_exp.run import resume as resuming
        from mnist_exp.sweeps import sweep

        folder = resuming.find(run, uri, lookup.open_runs())
        try:
            with lookup.uploading(folder) as uploader:
                if sweep.is_sweep(folder):
                    return sweep.resume_sweep(folder, failed, uploader, reporter)
                return resuming.resume_run(folder, reporter, uploader)
        except (KeyboardInterrupt, Terminated) as error:
            if not getattr(error, "__notes__", []):  # it had not begun
                error.add_note(str(folder))
            raise


def evaluate(
    run: str = "last", overrides: Sequence[str] = (), *, split: str = "test", tta: bool = False
) -> "Evaluation":
    """Evaluate the saved model of a run on the official test set, or on its split "val".

    With `tta`, average over shifts by one pixel, and mirror images where the run was trained on
    them. Raise ConfigError.
    """
    from mnist_exp.run.lookup import find_run

    store, stored_run, root = find_run(run, overrides, data=True)

    from mnist_exp.run import evaluate as evaluation

    return evaluation.evaluate(store, stored_run, root, split=split, tta=tta)


def ensemble(
    sweep: str = "last", overrides: Sequence[str] = (), *, split: str = "test", tta: bool = False
) -> "Ensemble":
    """Evaluate the models of a sweep's chosen cell together, over its seeds, as `evaluate` does."""
    from mnist_exp.run.lookup import find_run

    store, parent, root = find_run(sweep, overrides, sweep=True, data=True)

    from mnist_exp.sweeps import ensemble as ensembles

    return ensembles.ensemble(store, parent, root, split=split, tta=tta)


def predict(
    files: Sequence[str | Path],
    run: str = "last",
    overrides: Sequence[str] = (),
    raw: bool = False,
    tta: bool = False,
) -> "list[Prediction]":
    """Return what the saved model of a run says of image files, one prediction a file.

    Args:
        files: Photographs or scans of ink on paper.
        run: The run.
        overrides: `tracking.uri=...` alone, the store to look into.
        raw: The images are light ink on black, as in MNIST: do not invert, crop and centre them.
        tta: Average over shifts by one pixel, and mirror images if it was trained on them.

    Raises:
        ConfigError: There is no such run, or it has left no model.
    """
    from mnist_exp.errors import check_list

    check_list("files", files)
    from mnist_exp.run.lookup import find_run

    store, stored_run, _ = find_run(run, overrides)

    from mnist_exp.run import predict as prediction

    return prediction.predict(store, stored_run, [Path(file) for file in files], raw, tta)


def predictions_figure(predictions: "Sequence[Prediction]") -> Any:
    """Return a figure of images and predictions, of which one or more could be read."""
    from mnist_exp.run import predict as prediction

    return prediction.draw(predictions, predictions[0].title)


def report(
    sweep: str = "last",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    output: Path | None = None,
    suffix: str = "png",
) -> "Report":
    """Report on a sweep from the store alone, and put the report onto its parent run.

    Args:
        sweep: The sweep, by its parent run.
        overrides: `tracking.uri=...` alone, the store to look into.
        verbose: Print the jobs, the leaderboard and the choice.
        output: A folder to write the files into, as well.
        suffix: The format of the figures in that folder: png, svg or pdf.

    Raises:
        ConfigError: There is no such sweep, or its report cannot be written.
    """
    from mnist_exp.run.console import reporting

    with reporting(verbose, f"the report of sweep {sweep}: loading its runs ...") as reporter:
        from mnist_exp.run.lookup import find_run

        store, parent, _ = find_run(sweep, overrides, sweep=True)

        from mnist_exp.sweeps import report_files

        return report_files.report_again(store, parent, output, suffix, reporter)


def reproduce(
    run: str = "last",
    overrides: Sequence[str] = (),
    verbose: bool = False,
    *,
    keep: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> "Reproduction":
    """Train a run again from its record alone, and compare every epoch.

    Args:
        run: The run.
        overrides: `tracking.uri=...`, the store to look into, and `dataset.root=...`, the folder
            of the data where that has moved.
        verbose: Print a line for every epoch.
        keep: The URI of a store for the second run, which is deleted otherwise.
        threads: The number of CPU threads, in place of the recorded one.
        device: The device, in place of the recorded one.

    Raises:
        ConfigError: There is no such run, or it cannot be trained again here.
    """
    from mnist_exp.run.console import reporting

    with reporting(verbose, f"run {run}, once more: loading its record ...") as reporter:
        from mnist_exp.run.lookup import find_run

        store, stored_run, root = find_run(run, overrides, data=True)

        from mnist_exp.run import reproduce as reproduction

        return reproduction.reproduce(
            store, stored_run, reporter, keep=keep, threads=threads, device=device, root=root
        )


def sync(
    folders: Sequence[str | Path] = (), *, to: str | None = None, forget: bool = False
) -> tuple[int, dict[Path, str]]:
    """Bring what waits to MLflow; return how many runs are there now, and why others are not.

    Args:
        folders: The output folders of runs and sweeps; without them, all that waits.
        to: The URI of another store, which the runs are meant for from now on.
        forget: Give up the runs in `folders`, and return how many they are. Their records stay.

    Raises:
        ConfigError: That cannot be done with one of the folders. Nothing has been changed.
    """
    from mnist_exp.run import lookup

    return lookup.sync(folders, to=to, forget=forget)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as a file, the same bytes each time.

    Raises:
        ValueError: The name of the file does not end in .png, .svg or .pdf.
        OSError: The file cannot be written.
    """
    from mnist_exp.figures import style

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style.save(figure, path)


def ui_page(run: str | None = None, overrides: Sequence[str] = ()) -> tuple[str, str]:
    """Return the URI of the store, and the page of MLflow's UI that shows a run or its experiment.

    Raises:
        ConfigError: There is no such store or run.
    """
    from mnist_exp.run import lookup

    store = lookup.open_store(overrides)
    return store.uri, store.page(run)


def list_runs(
    overrides: Sequence[str] = (), *, sweeps: bool | None = None
) -> list[tuple[str, str]]:
    """Return the ids and names of the runs in a store, newest first, without importing MLflow.

    Args:
        overrides: `tracking.uri=...` is the store to look into; other ones do not matter.
        sweeps: Sweeps alone (True), or runs that are no sweep (False); None is both.

    Raises:
        ConfigError: The store cannot be opened.
    """
    from mnist_exp.config.overrides import tracking_uri
    from mnist_exp.config.paths import output_root
    from mnist_exp.tracking import store
    from mnist_exp.tracking.address import store_uri
    from mnist_exp.tracking.store_check import check_store

    typed_uri = tracking_uri([word for word in overrides if word.startswith("tracking.")])
    uri = store_uri(typed_uri, output_root())
    check_store(uri)
    return store.list_runs(uri, sweeps)


def default_store() -> str:
    """Return the URI of the store that is used where no override names one."""
    from mnist_exp.config.paths import output_root
    from mnist_exp.tracking.address import store_uri

    return store_uri(None, output_root())


def mark_dead_runs() -> dict[Path, str]:
    """Give runs and sweeps whose process was killed their true status, and return the reasons.

    They are by the output folder; a job of a sweep is marked, and not in the answer.
    """
    from mnist_exp.config.paths import output_root

    if not (output_root() / "outputs" / ".open").is_dir():  # as it is nearly always
        return {}
    from mnist_exp.tracking import run_log

    marked = run_log.mark_dead_runs(run_log.open_runs_at(output_root()))
    return {folder: history.reason for folder, history in marked if not history.parent}


def _config(composed: "DictConfig") -> "Config":
    from mnist_exp.config.schema import task_config
    from mnist_exp.config.validate import validate

    return validate(task_config(composed))
