"""Signals that ask a run to end: between two steps, so that what it has reached can be kept."""

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from mnist_exp.errors import Terminated

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal is gone
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PATIENCE = 3  # seconds until a step that does not end is interrupted

_received: list[int] = []  # signals, since the newest run began
_follows_parent = False  # the parent ends this process, and may send its signal more than once


def handle() -> None:
    """Let SIGTERM and SIGHUP raise Terminated in this process, and SIGINT KeyboardInterrupt.

    Python drops an exception that is raised in a destructor, or in a callback of the garbage
    collector: `check` raises it again.
    """
    _received.clear()
    for number in _not_ignored():
        signal.signal(number, _raise_at_once)


def _not_ignored() -> list[int]:
    """Return the signals to handle; one that is ignored, as SIGHUP is under nohup, stays so."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def ignore() -> None:
    """Ignore the signals for the rest of the process."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def follow_parent() -> None:
    """Let this forked process end with its parent, also where that is killed (Linux).

    The parent may send its signal more than once, which makes no difference.
    """
    global _follows_parent
    _follows_parent = True
    end_with_parent(signal.SIGTERM)


def end_with_parent(number: int) -> None:
    """Let the system send a signal to this forked process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _raise_at_once(number: int, frame: Any) -> NoReturn:
    _received.append(number)
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(128 + number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Keep signals back in a block, which calls `check` where it can end.

    Unless it does so within seconds, or if a second signal comes, it is interrupted where it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are none of its business
        return
    if signal.getsignal(signal.SIGTERM) not in (_raise_at_once, _defer):
        _received.clear()  # of an earlier run in this process
    check()
    before = {number: signal.signal(number, _defer) for number in _not_ignored()}
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _received and _follows_parent else handler)


def _defer(number: int, frame: Any) -> None:
    if _received and _follows_parent:
        return
    if _received:
        _raise(number)
    _received.append(number)
    signal.alarm(PATIENCE)


def _interrupt(number: int, frame: Any) -> None:
    signal.alarm(1)  # again, where the exception is dropped
    check()


def check() -> None:
    """Raise KeyboardInterrupt or Terminated if a signal has come."""
    if _received:
        _raise(_received[0])


def received() -> bool:
    """Return whether a signal has come."""
    return bool(_received)
