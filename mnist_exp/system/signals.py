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

_asked: list[int] = []  # signals that have come
_led = False  # this process is ended by its parent, which may ask more than once


def handle() -> None:
    """SIGTERM and SIGHUP raise Terminated in this process, as SIGINT raises KeyboardInterrupt.

    Python drops an exception that is raised in a destructor, or in a callback of the garbage
    collector: `check` raises it again.
    """
    _asked.clear()
    for number in _heard():
        signal.signal(number, _come)


def _heard() -> list[int]:
    """One that is ignored, as SIGHUP is under nohup, stays so."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def ignore() -> None:
    """From here on."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def follow_parent() -> None:
    """For a forked process: its parent ends it, more than once where that is no matter, and it is
    asked to end where its parent is killed (Linux)."""
    global _led
    _led = True
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _come(number: int, frame: Any) -> NoReturn:
    _asked.append(number)
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(128 + number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """What is in here looks for itself whether it is to end: `check`.

    Unless it does so within seconds, or is asked a second time, it is interrupted where it stands.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are none of its business
        return
    if signal.getsignal(signal.SIGTERM) not in (_come, _defer):
        _asked.clear()  # of an earlier run in this process
    check()
    before = {number: signal.signal(number, _defer) for number in _heard()}
    alarm = signal.signal(signal.SIGALRM, _late)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _asked and _led else handler)


def _defer(number: int, frame: Any) -> None:
    if _asked and _led:
        return
    if _asked:
        _raise(number)
    _asked.append(number)
    signal.alarm(PATIENCE)


def _late(number: int, frame: Any) -> None:
    signal.alarm(1)  # again, where the exception is dropped
    check()


def check() -> None:
    """Raises KeyboardInterrupt or Terminated where a signal has come."""
    if _asked:
        _raise(_asked[0])


def asked() -> bool:
    """Whether a signal has come."""
    return bool(_asked)
