"""Runs and sweeps that stopped before their end: which one is meant, and going on with a run."""

import os
from collections.abc import Mapping
from pathlib import Path

from mnist_exp.errors import ConfigError
from mnist_exp.run.console import Reporter
from mnist_exp.run.folder import load_composed
from mnist_exp.run.job import check_unchanged, prepare
from mnist_exp.run.recorder import Result
from mnist_exp.run.train import train
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns, open_histories
from mnist_exp.tracking.store import Store, has_runs
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.tracking.upload import UploadState
from mnist_exp.tracking.uploader import Uploader


def find(word: str, uri: str, open_runs: OpenRuns) -> Path:
    """Return the folder of the run or sweep that a person means.

    It is looked for first among the runs that MLflow does not have whole, which takes no server.

    Args:
        word: `last`, an id or its beginning, or a folder.
        uri: The store.
        open_runs: The registry of the runs that MLflow does not have whole.

    Raises:
        ConfigError: There is no such run, or several, or it cannot be gone on with.
    """
    if os.path.isdir(word or "."):
        if word and journal.size(Path(word)) > 0:
            return _resumable(Path(word).resolve())
        raise ConfigError(
            f"{word or repr(word)}: it holds no record of a run ({journal.NAME}) to go on with"
        )
    histories = {entry.folder: history for entry, history in open_histories(open_runs)}
    if word == "last":
        return _find_last(histories, uri, open_runs)
    names = {f: (history.key, UploadState.of(f).run_id) for f, history in histories.items()}
    matching = [f for f, ids in names.items() if any(i.startswith(word) for i in ids)]
    if len(matching) > 1:
        raise ConfigError(f"{word}: {len(matching)} runs begin like this; give more of it")
    if matching:
        return _resumable(matching[0])
    if has_runs(uri):
        return _resumable(_folder_of(Store(uri).find(word, sweep=None)))
    raise _no_such_run(word, uri, open_runs)


def _find_last(histories: Mapping[Path, RunHistory], uri: str, open_runs: OpenRuns) -> Path:
    """Return the folder of the run or sweep that began last: an open one, or one in the store."""
    folders = [folder for folder, history in histories.items() if not history.parent]
    newest = max(folders, key=lambda folder: histories[folder].start_time, default=None)
    if has_runs(uri):
        try:
            stored = Store(uri).find("last", sweep=None)
        except ConfigError:
            if newest is None:
                raise
        else:
            if newest is None or stored.start_time > histories[newest].start_time:
                return _resumable(_folder_of(stored))
    if newest is None:
        raise _no_such_run("last", uri, open_runs)
    return _resumable(newest)


def _no_such_run(word: str, uri: str, open_runs: OpenRuns) -> ConfigError:
    return ConfigError(f"{word}: there is no such run, neither in {uri} nor in {open_runs.folder}")


def _folder_of(run: StoredRun) -> Path:
    """Return the folder of a stored run. Raise ConfigError if it is not on this machine."""
    if not (run.folder / journal.NAME).exists():
        raise ConfigError(
            f"run {run.id}: its folder is not on this machine ({run.folder}), so there is "
            f"nothing to go on from"
        )
    return run.folder


def _resumable(folder: Path) -> Path:
    """Return a folder. Raise ConfigError if its record is damaged, or is that of a sweep's job."""
    history = RunHistory.of(folder)
    if not history.key:
        raise ConfigError(
            f"{folder / journal.NAME}: its first line is damaged, so it cannot be gone on with"
        )
    if history.parent:
        name = UploadState.of(Path(history.parent)).run_id[:8] or history.parent
        raise ConfigError(f"{folder}: this is a job of a sweep. To go on: mnist-exp resume {name}")
    return folder


def resume_run(folder: Path, reporter: Reporter, uploader: Uploader) -> Result | None:
    """Go on with a run to the end it would have had, or return None if it has reached it.

    Raises:
        ConfigError: It cannot be gone on with. Nothing has been changed.
    """
    history = RunHistory.of(folder)
    name = f"run {UploadState.of(folder).run_id[:8] or history.key[:8]}  {history.name}"
    if history.status == "FINISHED":
        reporter.line(f"{name}: it is finished; there is nothing to go on with")
        return None
    if history.reason.startswith("diverged"):
        raise ConfigError(f"{name}: it {history.reason}. It would again: train with other numbers")
    check_store(history.uri, history.experiment, required=False)
    composed = load_composed(folder)
    try:
        job = prepare(composed)
        check_unchanged(job, history)
    except ConfigError as error:
        raise ConfigError(f"{folder / '.hydra' / 'config.yaml'}: {error}") from error
    reporter.line(
        f"{name}: goes on in {folder}; {history.epochs} of {job.config.training.epochs} "
        f"epochs are recorded"
    )
    return train(job, folder, reporter, uploader, store=history.uri, resume=True)
