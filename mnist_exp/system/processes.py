"""Processes: those that are forked to run jobs, and whether one is still running."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mnist_exp.system import signals

END_SECONDS = 4.0  # that a process has to write its checkpoint and its records

# To be held by a thread while it prints, or does anything else that takes a lock: a process that is
# forked meanwhile would inherit the lock, and wait for ever for the thread, which it does not have.
no_fork = threading.Lock()
os.register_at_fork(
    before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=no_fork.release
)


def fork(function: Callable[..., Any], *arguments: Any) -> tuple[Connection, Any]:
    """Call a function in a process of its own, which this process ends.

    Return the connection that its answer arrives at, for `receive`, and the process.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    return receiver, process


def _answer(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Call a function in the forked process, and send what it returns."""
    signals.follow_parent()
    try:
        sender.send(function(*arguments))
    except KeyboardInterrupt:  # the other processes have it as well
        sys.exit(130)


def receive(connection: Connection, process: Any) -> Any:
    """Return what a process has sent; or, where it died without a word, why it ended (str)."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if code == 130:  # Ctrl-C, which ends the sweep
            raise KeyboardInterrupt from None
        if code < 0:
            return f"its process was killed ({signal.Signals(-code).name})"
        return f"its process ended with status {code}"
    process.join()
    return answer


def end(processes: Sequence[Any]) -> None:
    """End processes; those that train write their checkpoints and journals first."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_SECONDS
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # a second Ctrl-C does not wait
        for process in processes:
            process.kill()
            process.join()


def process_identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, pid, and born, when it started."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "born": _start_time(pid)}


def is_running(owner: Mapping[str, Any]) -> bool | None:
    """Return whether the process of an identity still runs; None where it cannot be told.

    That is so on another host, and where the system hides the processes of other users.
    """
    if owner["host"] != socket.gethostname():
        return None
    start_time = _start_time(owner["pid"])
    if start_time is not None:
        return bool(start_time == owner["born"])
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return None  # hidden; or a new process since the line above, and the next call will tell


def _start_time(pid: int) -> str | None:
    """Return when a process started; "" for a zombie, None where none is seen."""
    return _start_time_by_proc(pid) if Path("/proc/self/stat").exists() else _start_time_by_ps(pid)


def _start_time_by_proc(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # "PID (COMMAND) STATE ...", and the command may have spaces and parentheses: proc(5)
    state, *fields = stat.rpartition(b")")[2].decode().split()
    if state in ("Z", "X"):
        return ""
    # ticks since the boot, which begin again with the next one
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[18]}"


def _start_time_by_ps(pid: int) -> str | None:
    # the same words for the same process, whatever the user's language and time zone
    fixed = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    state, _, start = subprocess.run(
        command, env=fixed, capture_output=True, text=True, check=False
    ).stdout.partition(" ")
    if not state:
        return None
    return "" if state.startswith("Z") else start.strip()
