"""Processes that are forked to run jobs, and answer with what those have come to."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mnist_exp import journal
from mnist_exp.tracker import Story

END_SECONDS = 4.0  # that a process has to write its checkpoint and its records


def fork(function: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
    """Calls a function in a process of its own. It gets, as its last argument, what it can `send`
    an answer by, which arrives at the connection that is returned beside the process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    return here, process


def receive(connection: Connection, process: Any) -> Any:
    """What a process has sent; or, where it died without a word, what became of it (str)."""
    try:
        found = connection.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if code == 130:  # Ctrl-C, which ends the sweep
            raise KeyboardInterrupt from None
        if code < 0:
            return f"its process was killed ({signal.Signals(-code).name})"
        return f"its process ended with status {code}"
    process.join()
    return found


def end(processes: Sequence[Any]) -> None:
    """Ends processes: those that train write their checkpoints and records first."""
    for process in processes:
        process.terminate()
    late = time.monotonic() + END_SECONDS
    try:
        for process in processes:
            process.join(max(0.0, late - time.monotonic()))
    finally:  # a second Ctrl-C does not wait
        for process in processes:
            process.kill()
            process.join()


def end_workers(folders: Sequence[Path]) -> None:
    """Ends joblib's processes, which may outlive their launcher, and waits for their jobs."""
    loky = sys.modules.get("joblib.externals.loky")
    if loky is None:
        return
    loky.get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    late = time.monotonic() + END_SECONDS
    for folder in folders:
        while not (story := Story.of(folder)).status and time.monotonic() < late:
            if not story.key or not journal.is_alive(story.owner):
                break
            time.sleep(0.05)
