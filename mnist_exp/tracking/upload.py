"""Journals on their way to MLflow: in the background while runs are trained, or later."""

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mnist_exp.errors import ConfigError, Terminated, first_line
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import OpenRuns
from mnist_exp.tracking.run_log import open_histories
from mnist_exp.tracking.store import NotReady, Store, UploadState, check_store, deliver

log = logging.getLogger(__name__)

PAUSE = 5.0  # seconds between two looks at the journals: each costs 10 ms a run that has news
SWITCH_SECONDS = 2e-4  # between threads that want Python's lock
MOST_FAILURES = 2  # in a row: it is not the run, it is the server
FORK_SECONDS = 5.0  # at most, that a fork waits for a delivery to end


def pending(open_runs: OpenRuns, uri: str = "") -> list[tuple[str, Path]]:
    """Of the runs that MLflow does not have whole: store and folder, sweeps before their jobs.

    `uri`: of this store alone, and only what no process is at work on.
    """
    found = []
    for entry, story in sorted(
        open_histories(open_runs), key=lambda found: found[0].kind != "sweep"
    ):
        idle = bool(story.status) or is_running(entry.owner) is False
        if story.key and (not uri or (story.uri == uri and idle)):
            found.append((story.uri, entry.folder))
    return found


def sync(open_runs: OpenRuns, uri: str = "") -> tuple[int, dict[Path, str]]:
    """Delivers what every store lacks, or the store `uri` alone. How many runs, and why not, by the
    folder, for the rest."""
    stores: dict[str, Store] = {}
    closed: dict[str, str] = {}  # stores that cannot be opened, and why
    failures: Counter[str] = Counter()  # of a store, in a row
    count, problems = 0, dict[Path, str]()
    for entry, story in open_histories(open_runs):
        if not story.key and journal.size(entry.folder) > 0:
            problems[entry.folder] = f"the first line of its {journal.NAME} is damaged"
    for its_uri, folder in pending(open_runs, uri):
        try:
            if its_uri in closed:
                raise NotReady(closed[its_uri])
            # first, and after failures in a row: is it those runs, or the store?
            if its_uri not in stores or failures[its_uri] >= MOST_FAILURES:
                stores[its_uri] = _opened(its_uri, closed)
                failures[its_uri] = 0
            deliver(folder, open_runs, stores[its_uri])
            count += 1
            failures[its_uri] = 0
        except NotReady as error:
            problems[folder] = str(error)
        except Exception as error:  # whatever a network, a server or a database can raise
            problems[folder] = first_line(error)
            failures[its_uri] += 1
    return count, problems


def _opened(uri: str, closed: dict[str, str]) -> Store:
    try:
        check_store(uri)
        return Store(uri)
    except ConfigError as error:
        closed[uri] = first_line(error)
        raise


class Uploader(threading.Thread):
    """Delivers the journals of some runs while they are written, in the background.

    Whatever happens to the server, nothing is raised, and nobody waits: what cannot be delivered
    stays in the journals, for a later try, or for `mnist-exp sync`. What earlier commands could not
    deliver to this store is delivered as well.
    """

    def __init__(self, uri: str, open_runs: OpenRuns, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name="uploader")
        self.uri, self.open_runs, self.say = uri, open_runs, say
        self.folders: list[Path] = []
        self.problem = ""  # why the newest try has failed
        self._store: Store | None = None
        self._earlier: list[Path] | None = None
        self._closing, self._late = threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._working = threading.Lock()

    def watch(self, folders: Sequence[Path]) -> None:
        """Also delivers these; a sweep's own comes before those of its jobs."""
        self.folders = [*self.folders, *(f for f in folders if f not in self.folders)]

    def run(self) -> None:
        # Whoever trains lets go of Python's lock in every operation, and would wait 5 ms to have it
        # back from a thread that is busy, as this one is when it imports MLflow.
        sys.setswitchinterval(SWITCH_SECONDS)
        wait = PAUSE
        while True:
            last = self._closing.is_set()
            with self._working:
                self._round()
            wait = PAUSE if not self.problem else min(2 * wait, 30.0)
            if self._late.is_set() or (last and not self.undelivered()):
                return
            self._wake.wait(wait if not last else min(wait, 1.0))
            self._wake.clear()

    def quiet(self) -> AbstractContextManager[Any]:
        """While it does nothing, so that a process can be forked. Waits for seconds at most."""
        return _within(self._working, FORK_SECONDS)

    def undelivered(self) -> list[Path]:
        """The folders whose journals MLflow does not have yet, to the end."""
        return [folder for folder in self.folders if _has_news(folder, self.uri)]

    def flush(self, seconds: float) -> None:
        """Returns once MLflow has all that is written by now, or does not take it; after some
        seconds at the latest."""
        end = time.monotonic() + seconds
        while self.undelivered() and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.02)
            if self.problem:
                return

    def begin(self) -> None:
        """Starts, unless it has."""
        if self.ident is None:
            self.start()

    def close(self, seconds: float) -> list[Path]:
        """Delivers the rest, for some seconds at most. Returns what is undelivered even so."""
        self._closing.set()
        self._wake.set()
        if self.ident is not None:
            self.join(seconds)
        self._late.set()
        self._wake.set()
        return self.undelivered()

    def _round(self) -> None:
        """Tries to deliver all that is new, and says so when the server goes, and comes back."""
        problem, failures = "", 0
        if self._earlier is None:
            self._earlier = [folder for _, folder in pending(self.open_runs, self.uri)]
        earlier = [folder for folder in self._earlier if _has_news(folder, self.uri)]
        for folder in [*self.undelivered(), *earlier]:
            if failures == MOST_FAILURES:
                break
            try:
                if self._store is None:
                    check_store(self.uri)  # where nobody answers, MLflow need not be imported
                    self._store = Store(self.uri)
                deliver(folder, self.open_runs, self._store)
                failures = 0
            except NotReady as error:
                if folder in self.folders:
                    problem = problem or str(error)
            except Exception as error:  # whatever a network, a server or a database can raise
                log.debug("not delivered: %s", folder, exc_info=error)
                failures += 1
                if folder in self.folders:  # of the others, an earlier command has told
                    problem = first_line(error)
        if problem and not self.problem:
            self._tell(
                f"MLflow at {self.uri} does not take the record ({problem}). It is kept in the "
                f"output folder, and delivered when MLflow answers"
            )
        elif self.problem and not problem:
            self._tell(f"MLflow at {self.uri} answers again")
        self.problem = problem

    def _tell(self, text: str) -> None:
        with suppress(OSError, Terminated):  # nobody reads, which who trains finds out by itself
            self.say(text)


def _has_news(folder: Path, uri: str) -> bool:
    return journal.size(folder) > UploadState.of(folder, uri).offset


@contextmanager
def _within(lock: threading.Lock, seconds: float) -> Iterator[None]:
    taken = lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        if taken:
            lock.release()
