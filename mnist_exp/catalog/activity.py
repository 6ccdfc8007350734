"""What is being trained on this machine now, and asking it to end."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mnist_exp.catalog.records import Record, is_meant, load_open_records
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.formatting import Table, finite, utc_time
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import journal, run_log
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.upload import UploadState
from mnist_exp.training.epochs import Focus

ENDING_SECONDS = 60.0  # that `stop` waits for the end of a record
_LEAVING_SECONDS = 10.0  # that it then waits for the process, which uploads the rest
_PAUSE = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Activity:
    """A run or a sweep that a process is at work on, as far as its journal tells."""

    record: Record
    epochs: int  # of a sweep: of all its jobs together; the same is true of what follows
    epochs_asked: float
    best_val_accuracy: float | None  # so far, 0 to 1
    images_per_second: float
    seconds_left: float | None  # at most, as a run may stop early; None until an epoch is done
    jobs_ended: int = 0
    running_jobs: Sequence["Activity"] = ()

    @property
    def is_sweep(self) -> bool:
        """True of a sweep."""
        return self.record.kind == "sweep"

    @property
    def progress(self) -> str:
        """The progress in words: "epoch 3/10", or "2/12 jobs, 4 running"."""
        if self.is_sweep:
            ended = f"{self.jobs_ended}/{self.record.jobs_asked} jobs"
            return f"{ended}, {len(self.running_jobs)} running"
        return f"epoch {self.epochs}/{self.record.epochs_asked or '?'}"

    @property
    def process(self) -> str:
        """The process in words."""
        assert self.record.open_run is not None
        owner = self.record.open_run.owner
        if owner["host"] != socket.gethostname():
            return f"{owner['pid']} on {owner['host']}"
        return str(owner["pid"]) if is_running(owner) else f"{owner['pid']} (hidden from you)"

    def row(self, *, indented: bool = False) -> list[str]:
        """Return it as a row of a table."""
        best, left = self.best_val_accuracy, self.seconds_left
        return [
            ("  " if indented else "") + self.record.id[:8],
            self.record.name,
            self.progress,
            "" if best is None else f"{best:.2%}",
            f"{self.images_per_second:,.0f}" if self.images_per_second else "",
            "" if left is None else str(timedelta(seconds=round(left))),
            self.process,
        ]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, whose names are stable: docs/tidying.md has them."""
        record = self.record
        assert record.open_run is not None
        owner = record.open_run.owner
        plain = {
            "id": record.id,
            "name": record.name,
            "kind": record.kind,
            "started": utc_time(record.start_time),
            "epochs": self.epochs,
            "epochs_asked": round(self.epochs_asked) or None,
            "best_val_accuracy": self.best_val_accuracy,
            "images_per_second": self.images_per_second or None,
            "seconds_left": self.seconds_left,
            "folder": str(record.folder),
            "process": {"host": owner["host"], "pid": owner["pid"], "seen": is_running(owner)},
        }
        if self.is_sweep:
            plain["jobs_ended"] = self.jobs_ended
            plain["jobs_asked"] = record.jobs_asked
            plain["jobs"] = [job.as_json() for job in self.running_jobs]
        return dict(finite(plain))


@dataclass(frozen=True)
class Status:
    """The runs and sweeps that are being trained now."""

    activities: Sequence[Activity]
    unfolded: bool = False  # the running jobs of sweeps are shown as well

    def table(self) -> Table:
        """Return a row for each run and sweep."""
        header = ["id", "name", "progress", "best val", "images/s", "time left", "process"]
        rows = []
        for activity in self.activities:
            rows.append(activity.row())
            if self.unfolded:
                rows += [job.row(indented=True) for job in activity.running_jobs]
        return Table(header, rows)

    def as_json(self) -> list[dict[str, Any]]:
        """Return them as plain values, the running jobs of sweeps included."""
        return [activity.as_json() for activity in self.activities]


def activities(open_runs: OpenRuns) -> list[Activity]:
    """Return all that processes are at work on, the newest first, with jobs in their sweeps."""
    at_work = [record for record in load_open_records(open_runs) if record.is_at_work]
    sweeps = {str(record.folder) for record in at_work if record.kind == "sweep"}
    found = []
    for record in at_work:
        assert record.folder is not None
        history = RunHistory.of(record.folder)
        if record.kind == "sweep":
            found.append(_of_sweep(record, history, at_work))
        elif history.parent not in sweeps:  # else it is shown with its sweep
            found.append(_of_run(record, history))
    return found


def choose(running: Sequence[Activity], word: str) -> list[Activity]:
    """Return the run or sweep that a person means, of those that run; none for `last` of none.

    Raises ConfigError where nothing that runs is named so, or several are.
    """
    matching = [a for a in running if word == "last" or is_meant(a.record, word)][:2]
    if word == "last":
        return matching[:1]
    if len(matching) == 1:
        return matching
    for sweep in running:
        if not matching and any(is_meant(job.record, word) for job in sweep.running_jobs):
            raise ConfigError(
                f"{word}: it is a job of the sweep {sweep.record.id[:8]}  {sweep.record.name}. To "
                f"see it with the others: mnist-exp status {sweep.record.id[:8]}"
            )
    names = ", ".join(activity.record.id[:8] for activity in running) or "nothing"
    problem = "several runs begin like this" if matching else "nothing that runs now is named so"
    raise ConfigError(f"{word}: {problem}. What runs on this machine: {names}. All: mnist-exp runs")


def _of_run(record: Record, history: RunHistory) -> Activity:
    done = _passes_since(history, history.owner_since)
    return Activity(
        record=record,
        epochs=history.epochs,
        epochs_asked=record.epochs_asked,
        best_val_accuracy=history.highest("val/accuracy"),
        images_per_second=history.newest().get("images_per_second", 0.0),
        seconds_left=_seconds_left(_passes_left(history), done, history.owner_since),
    )


def _of_sweep(record: Record, sweep: RunHistory, at_work: Sequence[Record]) -> Activity:
    """Return what a sweep is at; its jobs that have ended are no longer in the registry."""
    assert record.folder is not None
    histories = [RunHistory.of(path.parent) for path in record.folder.rglob(f"*/{journal.NAME}")]
    histories = [history for history in histories if history.parent == str(record.folder)]
    by_key = {history.key: history for history in histories}
    running = [_of_run(job, by_key[job.key]) for job in at_work if job.key in by_key]
    running.sort(key=lambda job: job.record.job_number)
    ended = [history for history in histories if history.is_over]
    asked = [_epochs_asked(history) for history in histories]
    # jobs that have not begun are taken to be as those that have
    unbegun = max(0, record.jobs_asked - len(histories)) / max(1, len(histories))
    left = unbegun * sum(map(_passes, histories, asked))
    left += sum(_passes_left(by_key[job.record.key]) for job in running)
    # a killed job is not running, and is gone on with where its sweep was resumed
    left += sum(_passes_left(history) for history in histories if history.status == "KILLED")
    done = sum(_passes_since(history, sweep.owner_since) for history in histories)
    accuracies = [history.highest("val/accuracy") for history in histories]
    return Activity(
        record=record,
        epochs=sum(history.epochs for history in histories),
        epochs_asked=sum(asked) * (1 + unbegun),
        best_val_accuracy=max((a for a in accuracies if a is not None), default=None),
        images_per_second=sum(job.images_per_second for job in running),
        seconds_left=_seconds_left(left, done, sweep.owner_since),
        jobs_ended=len(ended),
        running_jobs=running,
    )


def _epochs_asked(history: RunHistory) -> int:
    return int(history.params.get("training.epochs", 0))


def _passes(history: RunHistory, epochs: int) -> float:
    """Return how often a run's first `epochs` epochs go through the training split, as in 1.5."""
    names = ("after", "hardest", "random")
    values = [history.params.get(f"training.focus.{name}", "None") for name in names]
    if "None" in values:  # every epoch sees all images
        return epochs
    return Focus(*map(float, values)).passes(epochs)


def _passes_left(history: RunHistory) -> float:
    return _passes(history, _epochs_asked(history)) - _passes(history, history.epochs)


def _passes_since(history: RunHistory, begin: int) -> float:
    """Return the passes of a run that a process which began then has done, itself or for it."""
    if history.owner_since < begin:
        return 0.0
    return _passes(history, history.epochs) - _passes(history, history.owner_after)


def _seconds_left(left: float, done: float, begin: int) -> float | None:
    """Return the seconds that passes over the images take, at the rate at which others were done.

    Args:
        left: How many are left.
        done: How many were done since `begin`.
        begin: The time, in ms since 1970.
    """
    if done <= 0:
        return None
    return max(0.0, left) * (time.time() - begin / 1000) / done


@dataclass(frozen=True)
class Stopped:
    """A run or a sweep that was asked to end, and has ended."""

    record: Record
    history: RunHistory  # with its status and the reason

    @property
    def id(self) -> str:
        """MLflow's id of it, which it may have got at its end; else the key of its record."""
        assert self.record.folder is not None
        return UploadState.of(self.record.folder).run_id or self.record.id

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, whose names are stable: docs/tidying.md has them."""
        record, history = self.record, self.history
        return {
            "id": self.id,
            "name": record.name,
            "kind": record.kind,
            "status": history.status,
            "reason": history.reason or None,
            "epochs": history.epochs,
            "folder": str(record.folder),
        }


def check_stoppable(record: Record, at_work: Sequence[Record]) -> None:
    """Raise ConfigError if a run or a sweep cannot be asked to end.

    Args:
        record: The run or the sweep.
        at_work: All that processes are at work on, for the message.
    """
    name = record.title
    if record.kind == "job":
        raise ConfigError(
            f"{name}: it is a job of a sweep, and a sweep ends as a whole. To stop the sweep: "
            f"mnist-exp stop {record.parent[:8]}"
        )
    if not record.is_at_work or record.open_run is None:
        others = ", ".join(other.id[:8] for other in at_work if other.kind != "job")
        raise ConfigError(
            f"{name}: it is not running here, it is {record.status}. What runs on this machine: "
            f"{others or 'nothing'}"
        )
    owner = record.open_run.owner
    if not is_running(owner):
        where = f"process {owner['pid']} on {owner['host']}"
        raise ConfigError(
            f"{name}: {where} trains it, which cannot be seen from here. Stop it there, as the "
            f"user who started it: mnist-exp stop {record.id[:8]}"
        )


def stop(record: Record, seconds: float = ENDING_SECONDS) -> Stopped:
    """Ask the process of a run or a sweep to end, and wait until its record has ended.

    The signal is SIGTERM: it does what Ctrl-C does, and a job that a shell has put in the
    background does not ignore it.

    Raises:
        ConfigError: The process is another user's.
        RunFailed: The record has not ended after so many seconds, was resumed, or is gone.
    """
    assert record.open_run is not None
    owner, folder = record.open_run.owner, record.open_run.folder
    try:
        os.kill(owner["pid"], signal.SIGTERM)
    except ProcessLookupError:  # it has ended by itself since
        pass
    except PermissionError:
        raise ConfigError(
            f"{record.kind} {record.id[:8]}: process {owner['pid']} is another user's, who alone "
            f"can stop it: mnist-exp stop {record.id[:8]}"
        ) from None
    late = time.monotonic() + seconds
    while not (history := RunHistory.of(folder)).status:
        if not history.key:
            raise RunFailed(f"{record.kind} {record.id[:8]}: {folder} was removed meanwhile")
        if history.owner != owner:
            raise RunFailed(
                f"{record.kind} {record.id[:8]}: it has ended, and process {history.owner['pid']} "
                f"on {history.owner['host']} has resumed it. To see it: mnist-exp status"
            )
        if is_running(owner) is False:
            run_log.mark_killed(folder, owner, f"its process ({owner['pid']}) ended without a word")
        if time.monotonic() > late:
            raise RunFailed(
                f"{record.kind} {record.id[:8]}: process {owner['pid']} was asked to end "
                f"{seconds:.0f} s ago, and has not ended yet. Look again: mnist-exp status. The "
                f"last resort, which costs what was trained since the newest checkpoint: "
                f"kill -KILL {owner['pid']}"
            )
        time.sleep(_PAUSE)
    _wait_for_end(owner, _LEAVING_SECONDS)
    return Stopped(record, history)


def _wait_for_end(owner: Any, seconds: float) -> None:
    """Wait for the end of a process, which may have more to do than to train: a notebook."""
    late = time.monotonic() + seconds
    while is_running(owner) and owner["pid"] != os.getpid() and time.monotonic() < late:
        time.sleep(_PAUSE)
