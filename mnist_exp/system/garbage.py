"""Python's garbage collector: its thresholds while a program starts, and while it trains."""

import gc

_usual: tuple[int, int, int] | None = None  # the thresholds, while others are in force
_has_frozen = False  # what exists; Python 3.12 has frozen something itself when it starts


def collect_rarely() -> None:
    """Raise the thresholds of the garbage collector, until `collect_as_usual` restores them.

    What torch and MLflow make as they are imported lives to the end of the program: to go through
    it again and again took 1.0 of 7.4 s of imports. A program that does not train leaves them.
    """
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(50_000, 100, 1000)


def collect_as_usual() -> None:
    """Restore the thresholds, if they are raised, and exclude from collection what exists by now.

    To be called before models are made: somebody's own may be in reference cycles, and would stay
    in memory when they are no longer trained.
    """
    global _usual, _has_frozen
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None
        if not _has_frozen:  # once in a process: later, it would keep what is garbage
            gc.freeze()
            _has_frozen = True
