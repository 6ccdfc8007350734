"""The runs that wait for their store: delivering them, sending them elsewhere, giving them up."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from mnist_exp.errors import ConfigError
from mnist_exp.system import files
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import journal
from mnist_exp.tracking.address import normalised
from mnist_exp.tracking.journal import Journal, RunHistory
from mnist_exp.tracking.run_log import OpenRun, OpenRuns, open_histories
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.upload import has_news, upload_all

log = logging.getLogger(__name__)


def waiting_runs(open_runs: OpenRuns, uri: str = "") -> list[tuple[OpenRun, RunHistory]]:
    """Return the runs that MLflow does not have whole, sweeps before their jobs.

    With a `uri`, only those of this store that no process is at work on.
    """
    histories = sorted(open_histories(open_runs), key=lambda pair: bool(pair[1].parent))
    return [
        (run, history)
        for run, history in histories
        if history.key and (not uri or (history.uri == uri and not _is_at_work(history)))
    ]


def _is_at_work(history: RunHistory) -> bool:
    """Return whether a process may be recording this run."""
    return not history.status and is_running(history.owner) is not False


def deliver(open_runs: OpenRuns, folders: Sequence[Path] = ()) -> tuple[int, dict[Path, str]]:
    """Upload what waits, all of it or that of some runs, each to its store.

    What was given up waits again where its folder is named. Returns how many runs were uploaded,
    and why not, by the folder, for the rest. Raises ConfigError for a folder without a record.
    """
    for folder in folders:
        if not any(_is_of(run, [folder]) for run in open_runs.entries()):
            for of_it, history in _with_jobs(folder):
                if has_news(of_it, history.uri):
                    open_runs.add(history.key, of_it, history.owner)
    unreadable = {
        run.folder: _why_unreadable(run.folder)
        for run, history in open_histories(open_runs)
        if not history.key and _is_of(run, folders)
    }
    waiting = [(h.uri, run.folder) for run, h in waiting_runs(open_runs) if _is_of(run, folders)]
    problems = upload_all(waiting, open_runs, {}, tries_again=True)
    reasons = {folder: problem.reason for folder, problem in problems.items()}
    return len(waiting) - len(problems), unreadable | reasons


def _why_unreadable(folder: Path) -> str:
    if not folder.is_dir():
        return "the folder is not there"
    if journal.size(folder) == 0:
        return f"there is no {journal.NAME}"
    return f"the first line of its {journal.NAME} is damaged"


def _is_of(run: OpenRun, folders: Sequence[Path]) -> bool:
    """Return whether a run, or its sweep, is in one of `folders`; without them, any is."""
    return not folders or any(folder in (run.folder, *run.folder.parents) for folder in folders)


def deliver_to(open_runs: OpenRuns, uri: str) -> None:
    """Upload what waits for a store; of each run that cannot be, say so once and never again."""
    waiting = waiting_runs(open_runs, uri)
    places = [(uri, run.folder) for run, _ in waiting]
    problems = upload_all(places, open_runs, {}, tries_again=True)
    news = [r for r, _ in waiting if r.folder in problems and not open_runs.was_warned(r.key)]
    by_reason: dict[str, list[OpenRun]] = {}
    for run in news:
        by_reason.setdefault(problems[run.folder].reason, []).append(run)
        open_runs.mark_warned(run.key)
    for reason, runs in by_reason.items():
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        log.warning(
            "%s%s: not in MLflow yet: %s. What can be done: mnist-exp sync",
            *(runs[0].folder, more, reason),
        )


def redirect(open_runs: OpenRuns, folders: Sequence[Path], uri: str) -> list[Path]:
    """Let another store have what waits, or the runs and sweeps in `folders`, from here on.

    A sweep goes there as a whole, what its store has of it included. Returns the folders. Raises
    ConfigError, with nothing changed, where that cannot be.
    """
    uri = normalised(uri)
    roots = [folder.resolve() for folder in folders] or [
        Path(history.parent or run.folder)
        for run, history in waiting_runs(open_runs)
        if history.uri != uri
    ]
    runs = {folder: h for root in dict.fromkeys(roots) for folder, h in _with_jobs(root)}
    for folder, history in runs.items():
        if _is_at_work(history):
            raise _at_work(folder, history)
    for experiment in {history.experiment for history in runs.values()}:
        check_store(uri, experiment, option="--to")
    for folder, history in runs.items():
        with journal.lock(folder), closing(Journal(folder)) as file:
            file.write("store", uri=uri)
            file.sync()
        open_runs.add(history.key, folder, history.owner)
    return list(dict.fromkeys(roots))


def _with_jobs(folder: Path) -> Iterator[tuple[Path, RunHistory]]:
    """Yield a run, or a sweep and its jobs, with their histories. Raise ConfigError."""
    history = RunHistory.of(folder) if folder.is_dir() else RunHistory()
    if not history.key:
        raise ConfigError(f"{folder}: it holds no record of a run that can be read")
    if history.parent:
        raise ConfigError(f"{folder}: this is a job of a sweep. Name the sweep: {history.parent}")
    try:
        files.check_writable_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: its record cannot be written to ({error.strerror}), as has to be noted "
            f"where it belongs. Make the folder writable"
        ) from error
    yield folder, history
    for path in sorted(folder.rglob(journal.NAME)):
        job = RunHistory.of(path.parent)
        if job.key and job.parent == str(folder):
            yield path.parent, job


def _at_work(folder: Path, history: RunHistory) -> ConfigError:
    return ConfigError(
        f"{folder}: process {history.owner['pid']} on {history.owner['host']} is at work on it. "
        f"Wait for its end"
    )


def forget(open_runs: OpenRuns, folders: Sequence[Path]) -> int:
    """Give up delivering the runs and sweeps in `folders`, and return how many runs those are.

    Their records stay where they are. Raises ConfigError, with nothing changed, where nothing
    waits there.
    """
    entries = list(open_histories(open_runs))
    given_up: dict[str, OpenRun] = {}
    for folder in folders:
        of_it = [(run, h) for run, h in entries if _is_of(run, [folder.resolve()])]
        if not of_it:
            raise ConfigError(
                f"{folder}: nothing there waits to be delivered. To see what waits: mnist-exp sync"
            )
        for run, history in of_it:
            if history.key and _is_at_work(history):
                raise _at_work(run.folder, history)
            given_up[run.key] = run
    for key in given_up:
        open_runs.remove(key)
    return len(given_up)
