"""The runs on record: those of a store, and those whose journals have more than the store has."""

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mnist_exp.config.schema import defaults_of_old
from mnist_exp.errors import ConfigError
from mnist_exp.system.processes import is_running
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.notes import NOTE
from mnist_exp.tracking.outages import may_pass
from mnist_exp.tracking.run_log import OpenRun, OpenRuns, open_histories
from mnist_exp.tracking.store import Store, has_runs
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.tracking.upload import UploadState

log = logging.getLogger(__name__)

BEST_ACCURACY, VAL_ACCURACY = "best/val_accuracy", "val/accuracy"
TEST_ACCURACY = "test/accuracy"
JOBS = "jobs"  # the tag of a sweep with the number of its jobs


@dataclass(frozen=True)
class Record:
    """A run, a sweep or a job of a sweep: what its store and its journal have, put together."""

    id: str  # MLflow's, or, where MLflow does not have it yet, the key of its journal
    key: str  # of its journal; "" of a run that another program has recorded
    name: str
    kind: str  # run, sweep or job
    parent: str  # the id of the sweep that a job belongs to, or ""
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    reason: str  # why it failed or was killed, or ""
    start_time: int  # ms since 1970
    end_time: int | None  # likewise; None before its end
    tags: Mapping[str, str]
    params: Mapping[str, str]  # of a run, also those that there were not when it was recorded
    metrics: Mapping[str, float]  # the newest value of each
    epochs: int  # that are recorded
    highest_val_accuracy: float | None  # of its epochs, as far as its journal is here
    dataset_digest: str  # the SHA-256 of its data, or ""
    dataset_sizes: Mapping[str, int]  # split -> number of images; empty where that is not known
    folder: Path | None  # its output folder, where it was trained
    stored: StoredRun | None  # as the store has it; None where the store does not have it yet
    open_run: OpenRun | None = None  # its entry where it has not ended, or is not delivered whole
    jobs: Sequence["Record"] = field(default=(), repr=False)  # of a sweep, in the order of its jobs

    @property
    def title(self) -> str:
        """The kind, the beginning of the id and the name, as messages have them."""
        return f"{self.kind} {self.id[:8]}  {self.name}"

    @property
    def is_waiting(self) -> bool:
        """True where it has ended and its store does not have all of it."""
        return self.open_run is not None and self.status != "RUNNING"

    @property
    def is_at_work(self) -> bool:
        """True where a process may be training it: one that runs here, or that cannot be seen."""
        if self.open_run is None or self.status != "RUNNING":
            return False
        return is_running(self.open_run.owner) is not False

    @property
    def job_number(self) -> int:
        """The number of a job in its sweep; -1 of anything else."""
        number = self.tags.get("job", "")
        return int(number) if number.isdecimal() else -1

    @property
    def epochs_asked(self) -> int:
        """The number of epochs that it is to have; 0 where that is not known."""
        number = self.params.get("training.epochs", "")
        return int(number) if number.isdecimal() else 0

    @property
    def jobs_asked(self) -> int:
        """The number of jobs that a sweep is to have, as far as its record tells."""
        if (number := self.tags.get(JOBS, "")).isdecimal():
            return int(number)
        ended = [self.metrics.get(f"jobs/{name}", 0.0) for name in ("finished", "not_finished")]
        return max(len(self.jobs), int(sum(ended)))

    def seconds(self, now: float) -> float:
        """Return the seconds from its start to its end, or to `now`, in seconds since 1970."""
        end = now if self.end_time is None else self.end_time / 1000
        return max(0.0, end - self.start_time / 1000)

    @property
    def note(self) -> str:
        """The text that a person has written, or ""."""
        return self.tags.get(NOTE, "")


def load_records(uri: str, open_runs: OpenRuns, *, required: bool = False) -> list[Record]:
    """Return all runs of a store, the newest first, and those that it does not have yet.

    Sweeps hold their jobs, which are in the list as well. Where a server does not answer, what
    waits for it, if anything, is all there is, and a warning says so.

    Args:
        uri: The address of the store.
        open_runs: The registry of the runs that their stores do not have whole.
        required: A server has to answer.

    Raises:
        ConfigError: The store cannot be read.
    """
    waiting = [(run, history) for run, history in open_histories(open_runs) if history.uri == uri]
    stored: list[StoredRun] = []
    if has_runs(uri):
        try:
            stored = Store(uri).of_kind(None)
        except ConfigError as error:
            if required or not waiting or not may_pass(error):
                raise
            log.warning("%s. Shown is what waits for it here", error)
    return _nested(_joined(stored, waiting))


def load_open_records(open_runs: OpenRuns) -> list[Record]:
    """Return the runs of all stores that have not ended, or wait for their store, newest first.

    No store is asked.
    """
    return _nested(_joined([], open_histories(open_runs)))


def _joined(
    stored: Iterable[StoredRun], waiting: Iterable[tuple[OpenRun, RunHistory]]
) -> list[Record]:
    """Return the records of both sources; where both have one, the journal is the newer.

    An entry of the registry whose journal is gone, or has not begun yet, is none.
    """
    records = {run.key or run.id: of_store(run) for run in stored}
    ids: dict[str, str] = {}  # the folder of a sweep -> its id
    begun = [(open_run, history) for open_run, history in waiting if history.key]
    for open_run, history in sorted(begun, key=lambda pair: bool(pair[1].parent)):
        known = records.get(history.key)
        record = _of_journal(open_run, history, known)
        if history.parent:
            parent = ids.get(history.parent) or UploadState.of(Path(history.parent)).run_id
            record = replace(record, parent=record.parent or parent)
        ids[str(open_run.folder)] = record.id
        records[history.key] = record
    return sorted(records.values(), key=_order)


def _order(record: Record) -> tuple[int, int, str]:
    """Return what sorts records, the newest first, also where several began in a millisecond."""
    return -record.start_time, -record.job_number, record.key


def of_store(run: StoredRun) -> Record:
    """Return the record of a run as its store has it."""
    return Record(
        id=run.id,
        key=run.key,
        name=run.name,
        kind=_kind(run.tags, bool(run.parent)),
        parent=run.parent,
        status=run.status,
        reason=run.tags.get("reason", ""),
        start_time=run.start_time,
        end_time=run.end_time,
        tags=run.tags,
        params=_with_later_keys(run.params),
        metrics=run.metrics,
        epochs=run.epochs,
        highest_val_accuracy=None,
        dataset_digest=run.dataset_digest,
        dataset_sizes=run.dataset_sizes,
        folder=run.folder if run.tags.get("output_dir") else None,
        stored=run,
    )


def _of_journal(open_run: OpenRun, history: RunHistory, known: Record | None) -> Record:
    """Return the record of a journal. `known`: what the store has of it, if anything."""
    return Record(
        id=known.id if known else UploadState.of(open_run.folder).run_id or history.key,
        key=history.key,
        name=history.name,
        kind=_kind(history.tags, bool(history.parent)),
        parent=known.parent if known else "",
        status=history.status or "RUNNING",
        reason=history.reason,
        start_time=history.start_time,
        end_time=history.end_time,
        tags={**(known.tags if known else {}), **history.tags},
        params=_with_later_keys(history.params),
        metrics=history.newest(),
        epochs=history.epochs,
        highest_val_accuracy=history.highest(VAL_ACCURACY),
        dataset_digest=history.dataset_digest,
        dataset_sizes=history.dataset_sizes,
        folder=open_run.folder,
        stored=known.stored if known else None,
        open_run=open_run,
    )


def _with_later_keys(params: Mapping[str, str]) -> Mapping[str, str]:
    """Return the parameters of a run with the keys that came later, as what they stand for."""
    if "training.epochs" not in params:  # a sweep, or what another program has recorded
        return params
    return {**{name: str(value) for name, value in defaults_of_old()}, **params}


def _kind(tags: Mapping[str, str], is_nested: bool) -> str:
    return "sweep" if "sweep" in tags else "job" if is_nested else "run"


def _nested(records: Sequence[Record]) -> list[Record]:
    """Return the records, with the jobs of each sweep in it."""
    jobs: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == "job":
            jobs.setdefault(record.parent, []).append(record)
    for of_sweep in jobs.values():
        of_sweep.sort(key=lambda job: job.job_number)
    return [
        replace(record, jobs=jobs.get(record.id, [])) if record.kind == "sweep" else record
        for record in records
    ]


def find(records: Sequence[Record], word: str, kinds: Sequence[str] = ()) -> Record:
    """Return the record that a person means.

    Args:
        records: All of them, the newest first.
        word: `last`, an id or its beginning, or the output folder.
        kinds: The kinds that are allowed, of run, sweep and job; all if there are none. `last` is
            never a job, unless that alone is allowed.

    Raises:
        ConfigError: There is no such record, or several, or it is of another kind.
    """
    what = " or ".join(kinds) if kinds else "run or sweep"
    if not isinstance(word, str):
        raise ConfigError(f"a {what} is named by a text, as in 'last', and not by {word!r}")
    if not word:
        raise ConfigError(f"''; a {what} is named by last, an id or its beginning, or its folder")
    allowed = [record for record in records if not kinds or record.kind in kinds]
    if word == "last":
        newest = [record for record in allowed if record.kind != "job" or kinds == ("job",)]
        if not newest:
            raise ConfigError(f"last: there is no {what} yet. To make one: mnist-exp train")
        return newest[0]
    matching = [record for record in records if is_meant(record, word)]
    # a key is looked at where no id will do, and what is of another kind makes no word ambiguous
    matching = [record for record in matching if record.id.startswith(word)] or matching
    matching = [record for record in matching if record in allowed] or matching
    if not matching:
        ids = ", ".join(record.id[:8] for record in allowed[:5])
        newest_ids = f"; the newest: {ids}" if ids else ""
        raise ConfigError(
            f"{word}: there is no such {what}. It is named by last, an id or its beginning, or its "
            f"folder{newest_ids}. All of them: mnist-exp runs --all"
        )
    if len(matching) > 1:
        lines = "".join(f"\n  {record.id}  {record.name}" for record in matching[:10])
        raise ConfigError(f"{word}: {len(matching)} ids begin like this; give more of it:{lines}")
    (record,) = matching
    if record not in allowed:
        raise ConfigError(f"{word}: it is a {record.kind}{_of_sweep(record)}, and not a {what}")
    return record


def is_meant(record: Record, word: str) -> bool:
    """Return whether a word is an id of a record, the beginning of one, or its output folder."""
    if not word:
        return False
    if record.id.startswith(word) or (record.key and record.key.startswith(word)):
        return True
    return "/" in word and record.folder is not None and record.folder == Path(word).resolve()


def _of_sweep(record: Record) -> str:
    return f" of sweep {record.parent[:8]}" if record.kind == "job" else ""


def best_val_accuracy(record: Record) -> float | None:
    """Return the best validation accuracy so far, 0 to 1: of a sweep, that of its best job.

    Of a run that did not come to its end, the epochs are looked through. Raises ConfigError where
    the store cannot be read.
    """
    best = record.metrics.get(BEST_ACCURACY, record.highest_val_accuracy)
    if best is not None:
        return best
    if record.kind == "sweep":
        of_jobs = [best_val_accuracy(job) for job in record.jobs]
        return max((accuracy for accuracy in of_jobs if accuracy is not None), default=None)
    if record.stored is None or VAL_ACCURACY not in record.metrics:
        return None
    points = _opened(record.stored.store_uri).history(record.id, VAL_ACCURACY)
    return max((value for _, value in points if math.isfinite(value)), default=None)


@functools.lru_cache(1)
def _opened(uri: str) -> Store:
    return Store(uri)
