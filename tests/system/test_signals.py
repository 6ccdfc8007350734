"""A process that is asked to end does so, whatever Python makes of it."""

import os
import signal
import weakref
from collections.abc import Iterator

import pytest

from mnist_exp.errors import Terminated
from mnist_exp.system import signals


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    for number in signals.ENDING:  # whatever started the tests may ignore some
        signal.signal(number, signal.SIG_DFL)
    signals.handle()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Thing:
    pass


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_raised_again(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    thing = Thing()
    weakref.finalize(thing, lambda: None)  # only so that the callback below is not the first
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing  # calls it, and drops what it raises
    assert reference() is None
    with pytest.raises(kind):
        signals.check()
    with pytest.raises(kind), signals.deferred():
        raise AssertionError("it begins in spite of the signal")


def test_deferred_waits_for_a_look() -> None:
    with pytest.raises(Terminated) as ended, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received()
        signals.check()
    assert ended.value.code == 128 + signal.SIGTERM


def test_the_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on in spite of two signals")


def test_what_does_not_look_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 1)
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_one_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.handle()
    os.kill(os.getpid(), signal.SIGHUP)
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
    assert not signals.received()


def test_a_later_run_in_the_same_process_does_not_end_for_an_earlier_signal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as where mnist_exp.train() is called
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        signals.check()
    with signals.deferred():
        signals.check()
