"""Runs and sweeps that stopped before their end: which one is meant, and going on with a run."""

import os
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from mnist_exp.errors import ConfigError
from mnist_exp.runs import train as run
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import check_unchanged, prepare, remembering
from mnist_exp.runs.recorder import Result
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import OpenRuns
from mnist_exp.tracking.run_log import RunHistory, open_histories
from mnist_exp.tracking.store import Store, StoredRun, UploadState, check_store, has_runs


def find(word: str, uri: str, open_runs: OpenRuns) -> Path:
    """The folder of the run or sweep that a person means: `last`, an id, its beginning, a folder.

    First among those that MLflow does not have whole, for which no server is needed.
    Raises ConfigError.
    """
    if os.path.isdir(word or "."):
        if word and journal.size(Path(word)) > 0:
            return _whole(Path(word).resolve())
        raise ConfigError(
            f"{word or repr(word)}: it holds no record of a run ({journal.NAME}) to go on with"
        )
    waiting = {entry.folder: story for entry, story in open_histories(open_runs)}
    if word != "last":
        names = {f: (story.key, UploadState.of(f).run_id) for f, story in waiting.items()}
        matching = [f for f, ids in names.items() if any(i.startswith(word) for i in ids if i)]
        if len(matching) > 1:
            raise ConfigError(f"{word}: {len(matching)} runs begin like this; give more of it")
        if matching:
            return _whole(matching[0])
    here = [f for f, story in waiting.items() if not story.parent]
    newest = max(here, key=lambda folder: waiting[folder].began, default=None)
    if has_runs(uri):
        try:
            found = Store(uri).find(word, sweep=None)
        except ConfigError:
            if word != "last" or newest is None:
                raise
        else:
            if word != "last" or newest is None or found.start_time > waiting[newest].began:
                return _whole(_folder_of(found))
    if word == "last" and newest is not None:
        return _whole(newest)
    raise ConfigError(f"{word}: there is no such run, neither in {uri} nor in {open_runs.folder}")


def _folder_of(run: StoredRun) -> Path:
    folder = Path(run.tags.get("output_dir", ""))
    if not (folder / journal.NAME).exists():
        raise ConfigError(
            f"run {run.id}: its folder is not on this machine ({folder}), so there is "
            f"nothing to go on from"
        )
    return folder


def _whole(folder: Path) -> Path:
    story = RunHistory.of(folder)
    if not story.key:
        raise ConfigError(
            f"{folder / journal.NAME}: its first line is damaged, so it cannot be gone on with"
        )
    if story.parent:
        name = UploadState.of(Path(story.parent)).run_id[:8] or story.parent
        raise ConfigError(f"{folder}: this is a job of a sweep. To go on: mnist-exp resume {name}")
    return folder


def resume_run(folder: Path, reporter: Reporter) -> Result | None:
    """Goes on with a run to the end it would have had. None: it has reached it.

    Raises ConfigError with nothing changed where it cannot be.
    """
    story = RunHistory.of(folder)
    name = f"run {UploadState.of(folder).run_id[:8] or story.key[:8]}  {story.name}"
    if story.status == "FINISHED":
        reporter.line(f"{name}: it is finished; there is nothing to go on with")
        return None
    if story.reason.startswith("diverged"):
        raise ConfigError(f"{name}: it {story.reason}. It would again: train with other numbers")
    check_store(story.uri, story.experiment, required=False)
    composed = thaw(folder)
    try:
        job = prepare(composed, remembering())
        job = replace(job, store_uri=story.uri)
        check_unchanged(job, story)
    except ConfigError as error:
        raise ConfigError(f"{folder / '.hydra' / 'config.yaml'}: {error}") from error
    epochs = max((step for step, _ in story.history("train/loss")), default=0)
    reporter.line(
        f"{name}: goes on in {folder}; {epochs} of {job.config.training.epochs} epochs are recorded"
    )
    return run.conduct(job, folder, reporter, resume=True)


def thaw(folder: Path) -> DictConfig:
    """The composed config of a run, as it was when it began. Raises ConfigError."""
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        own = OmegaConf.load(folder / ".hydra" / "hydra.yaml")
        assert isinstance(config, DictConfig) and isinstance(own, DictConfig)
        with open_dict(config):
            config.hydra = own.hydra
    except Exception as error:  # whatever a file can hold
        raise ConfigError(
            f"{folder / '.hydra'}: the run's config cannot be read ({error})"
        ) from error
    return config
