"""The uploader: it brings the journals of runs to MLflow while they are trained."""

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mnist_exp.errors import Terminated, first_line
from mnist_exp.system import garbage, signals
from mnist_exp.system.processes import no_fork
from mnist_exp.tracking.mlflow_internals import import_mlflow
from mnist_exp.tracking.outages import may_pass
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import Problem, has_news, upload_all
from mnist_exp.tracking.waiting import waiting_runs

log = logging.getLogger(__name__)

PAUSE = 5.0  # seconds between two looks at the journals: each costs 10 ms a run that has news
LONGEST_PAUSE = 30.0  # seconds between two tries while the server fails
CLOSING_PAUSE = 1.0  # seconds between two tries, at most, when it is to end
_WHAT_NEXT = {  # keyed by Problem.may_pass
    True: "delivered when MLflow answers",
    False: "can be delivered once that is mended, by mnist-exp sync, or to another store, by "
    "mnist-exp sync --to URI",
}
_ENDED = (
    "the process that uploads to MLflow has ended before its time. The record is kept in the "
    "output folder. To upload the rest at the end: mnist-exp sync"
)


class Uploader:
    """A process that uploads the journals of some runs while they are written.

    Whatever happens to the server, nothing is raised, and nobody waits: what cannot be uploaded
    stays in the journals, for a later try, or for `mnist-exp sync`. What earlier commands could not
    bring to this store is uploaded as well, while there is time.

    It is a context manager. The process begins with the block, and imports MLflow while this one
    imports torch. It is forked, where that is safe: elsewhere than on Linux it is a thread.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.uri = ""
        self.problem = ""  # why the newest try has failed
        self._is_closing = False
        self._report: Callable[[str], None] = log.warning
        self._listener = threading.Thread(target=self._listen, daemon=True, name="uploads")

    def __enter__(self) -> "Uploader":
        self._connection, other_end = multiprocessing.Pipe()
        self._worker: Any
        if sys.platform == "linux":
            context = multiprocessing.get_context("fork")
            arguments = (other_end, self._connection)
            self._worker = context.Process(target=_serve_process, args=arguments, daemon=True)
            self._worker.start()
            other_end.close()
        else:
            self._worker = threading.Thread(target=_serve, args=(other_end,), daemon=True)
            self._worker.start()
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closing = True
        if sys.platform == "linux":
            self._worker.kill()
            self._worker.join()
            self._listener.join(1.0)  # which the end of the process ends
        self._connection.close()

    def open(self, uri: str, open_runs: OpenRuns, report: Callable[[str], None]) -> None:
        """Begin to upload.

        Args:
            uri: The store to upload to.
            open_runs: A run leaves it once the store has all of it.
            report: Is told when the server goes, and when it comes back.
        """
        self.uri, self._report = uri, report
        self._tell("open", uri, open_runs)

    def watch(self, folders: Sequence[Path]) -> None:
        """Also upload from these folders; a sweep's own comes before those of its jobs."""
        self.folders = list(dict.fromkeys([*self.folders, *(f.resolve() for f in folders)]))
        self._tell("watch", self.folders)

    def pending(self) -> list[Path]:
        """Return the folders whose journals MLflow does not have to the end."""
        return [folder for folder in self.folders if has_news(folder, self.uri)]

    def flush(self, seconds: float) -> None:
        """Return once MLflow has all that is written by now, or does not take it, or it is late."""
        end = time.monotonic() + seconds
        self._tell("upload")
        while self.pending() and not self.problem and time.monotonic() < end:
            time.sleep(0.02)

    def close(self, seconds: float) -> list[Path]:
        """Upload the rest, for some seconds at most, and return the folders that are pending."""
        self._is_closing = True
        self._tell("close")
        self._worker.join(seconds)
        return self.pending()

    def _tell(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # the process has ended, which _listen reports
            self._connection.send(message)

    def _listen(self) -> None:
        """Pass on what the process reports, until it ends, and that it has ended before its time.

        Something may have killed it, as the system does where memory is short.
        """
        has_ended = False
        while not has_ended:
            try:
                self.problem, text = self._connection.recv()
            except (EOFError, OSError):
                if self._is_closing:
                    return
                has_ended, self.problem, text = True, "the process that uploads has ended", _ENDED
            # who trains sees that nobody reads
            with no_fork, contextlib.suppress(OSError, Terminated):
                self._report(text)


def _serve_process(connection: Connection, other_end: Connection) -> None:
    """Serve an uploader in the process that was forked for it."""
    other_end.close()
    signals.ignore()  # they ask those to end whose records are to be uploaded
    signals.end_with_parent(signal.SIGKILL)
    import_mlflow()  # before `_serve` does, for what it makes to be excluded from collection
    garbage.collect_as_usual()
    _serve(connection)


def _serve(connection: Connection) -> None:
    """Upload what is new, again and again, until the other end of the connection is closed."""
    import_mlflow()  # which takes seconds, in which the other process gets ready to train
    with connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _, uri, open_runs = connection.recv()
        UploadLoop(uri, open_runs, connection).run()


class UploadLoop:
    """A loop that uploads what is new, in the process of an uploader."""

    def __init__(self, uri: str, open_runs: OpenRuns, connection: Connection) -> None:
        """Prepare to upload to the store `uri`, as the other end of `connection` says."""
        self.uri, self.open_runs, self.connection = uri, open_runs, connection
        self.folders: list[Path] = []
        self.problem = ""
        self.is_closing = False
        self._stores: dict[str, Store] = {}
        self._earlier: deque[Path] | None = None  # not known yet

    def run(self) -> None:
        """Upload until all is uploaded that there was when the uploader was closed.

        What earlier commands have left comes one run at a time, while there is nothing else to do.
        """
        pause = 0.0
        while True:
            self._receive(min(pause, CLOSING_PAUSE) if self.is_closing else pause)
            is_last = self.is_closing
            problem = self.upload_news()
            if is_last and not (problem and problem.may_pass):
                return
            if problem:
                pause = min(2 * pause, LONGEST_PAUSE) if pause else PAUSE
            else:
                pause = 0.0 if self._upload_earlier() else PAUSE

    def _receive(self, seconds: float) -> None:
        """Do what the other process asks for, which is waited for, for some seconds at most."""
        while self.connection.poll(seconds):
            kind, *rest = self.connection.recv()
            if kind == "watch":
                (self.folders,) = rest
            self.is_closing = self.is_closing or kind == "close"
            seconds = 0.0  # what else has come already

    def upload_news(self) -> Problem | None:
        """Try to upload all that is new, and return why the first run failed that did.

        The other process is told when the server goes, and when it comes back.
        """
        try:
            problems = self._upload(self.folders)
        except Exception as error:  # whatever a file system raises where records are looked for
            log.debug("not uploaded", exc_info=error)
            problems = dict.fromkeys(self.folders, Problem(first_line(error), may_pass(error)))
        problem, text = next(iter(problems.values()), None), ""
        if problem and not self.problem:
            text = (
                f"MLflow at {self.uri} does not take the record ({problem.reason}). It is kept in "
                f"the output folder, and {_WHAT_NEXT[problem.may_pass]}"
            )
            with contextlib.suppress(OSError):  # then the next command tells it again
                for run in self.open_runs.entries():
                    if run.folder in problems:
                        self.open_runs.mark_warned(run.key)
        elif self.problem and not problem:
            text = f"MLflow at {self.uri} answers again"
        self.problem = problem.reason if problem else ""
        if text:
            self.connection.send((self.problem, text))
        return problem

    def _upload_earlier(self) -> bool:
        """Upload one of the runs that earlier commands left, unless something is asked for.

        Return whether to go on with the next one at once. Of those that fail, nothing is said, as
        an earlier command has told.
        """
        if self.connection.poll():
            return False
        try:
            if self._earlier is None:
                runs = waiting_runs(self.open_runs, self.uri)
                self._earlier = deque(run.folder for run, _ in runs)
            if not self._earlier:
                return False
            folder = self._earlier.popleft()
            problem = self._upload([folder]).get(folder)
        except Exception as error:  # as above
            log.debug("no earlier run uploaded", exc_info=error)
            return False
        if problem and problem.may_pass:
            self._earlier.append(folder)
            return False
        return True

    def _upload(self, folders: Sequence[Path]) -> dict[Path, Problem]:
        """Upload what is new in some folders, and return why not for those that failed."""
        waiting = [(self.uri, folder) for folder in folders if has_news(folder, self.uri)]
        return upload_all(waiting, self.open_runs, self._stores, tries_again=False)
