"""The command of `tracking.on_end`, which is run once at the end of a run or a sweep."""

import contextlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_exp.formatting import finite
from mnist_exp.system.processes import process_identity
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.upload import UploadState

log = logging.getLogger(__name__)

SECONDS = 60.0  # that the command may take
STANDARD_ERROR = 2  # the descriptor: standard output has the results of the run alone


def run_on_end(command: str | None, folder: Path, more: Mapping[str, Any] | None = None) -> None:
    """Run the command of a run or a sweep whose record this process has ended.

    Whatever goes wrong with it is a warning: the run is as it is.

    Args:
        command: For the shell; None where nothing is to be run.
        folder: The folder of the run or the sweep.
        more: What its standard input has beside `result_of`.
    """
    if command is None:
        return
    try:
        history = RunHistory.of(folder)
        if not history.status or history.owner != process_identity():
            return  # it has not begun, or another process trains it
        result = {**result_of(folder, history), **(more or {})}
        problem = _run(command, json.dumps(result), SECONDS)
    # a folder that is no more, a system without room for a process; a NUL in the command
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        log.warning("tracking.on_end=%s: %s. The run is not affected", command, problem)


def result_of(folder: Path, history: RunHistory) -> dict[str, Any]:
    """Return what a run or a sweep has come to, as plain values for JSON."""
    return {
        "kind": "sweep" if "sweep" in history.tags else "run",
        "id": UploadState.of(folder).run_id or history.key,
        "name": history.name,
        "status": history.status,
        "reason": history.reason or None,
        "folder": str(folder.resolve()),
        "store": history.uri,
        "metrics": finite(history.newest()),
    }


def _run(command: str, text: str, seconds: float) -> str:
    """Run a command with a text on its standard input, and return what went wrong, or ""."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.PIPE,
        stdout=STANDARD_ERROR,
        text=True,
        process_group=0,  # so that all it has started ends with it
    )
    try:
        process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"it was ended, as it took more than {seconds:.0f} seconds"
    finally:
        if process.poll() is None:  # too late, or a signal has come
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        number = -process.returncode
        known = {each.value: each.name for each in signal.Signals}  # real-time ones have no name
        return f"it was ended by {known.get(number, f'signal {number}')}"
    return f"it ended with status {process.returncode}" if process.returncode else ""
