"""How often Python looks for garbage: rarely while a program starts, as usual while it trains."""

import gc

_usual: tuple[int, int, int] | None = None  # the thresholds, while others are in force


def collect_rarely() -> None:
    """Look for garbage rarely, in this process.

    What torch and MLflow make as they are imported lives to the end of the program. To look through
    it again and again takes an eighth of the time of the imports, and a twelfth of a short run.
    """
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(50_000, 100, 1000)


def collect_as_usual() -> None:
    """End what `collect_rarely` has begun, if it has; pass over what there is until now.

    Models are in reference cycles: one that is no longer trained would stay in memory.
    """
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None
        if not gc.get_freeze_count():  # once in a process: later, it would keep what is garbage
            gc.freeze()
