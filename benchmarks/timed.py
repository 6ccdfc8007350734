"""`python -m benchmarks.timed OUT.json VERB ...`: mnist-exp, and what it spent its time on.

Seconds of a processor, summed over the process and those that are forked from it for the stacks.
Where one of the measured functions calls another, the time is that of the outer one.
"""

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_exp.cli import main as cli
from mnist_exp.runs import recorder
from mnist_exp.sweeps import launcher
from mnist_exp.tracking import store, upload
from mnist_exp.training import step

# where the name of each measured function is looked up, the name, and the kind of its work
MEASURED: list[tuple[Any, str, str]] = [
    (upload, "upload_journal", "upload"),
    (recorder, "record_model", "model"),
    (store.Store, "__init__", "store"),
    (step.TrainStep, "compile", "compile"),
    (step.TrainStep, "__call__", "steps"),
]
SECONDS = dict.fromkeys((kind for *_, kind in MEASURED), 0.0)
_thread = threading.local()  # whether a measured function runs in it


def measure(owner: Any, name: str, kind: str) -> None:
    """Replace `owner.name` by a function that adds its processor time to that of its kind.

    It is the time of the thread that calls it, as a thread in the background mostly waits for
    those that train.
    """
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def measured(*arguments: Any, **named: Any) -> Any:
        if getattr(_thread, "is_measured", False):
            return original(*arguments, **named)
        _thread.is_measured = True
        began = time.thread_time()
        try:
            return original(*arguments, **named)
        finally:
            _thread.is_measured = False
            SECONDS[kind] += time.thread_time() - began

    setattr(owner, name, measured)


def measure_forks(out: Path) -> None:
    """Have each process that the launcher forks write what it spent to a file beside `out`."""
    patched: Any = launcher  # which looks the name up, and does not export it
    original = patched.fork

    def fork(function: Callable[..., Any], *arguments: Any) -> Any:
        def measured(*arguments: Any) -> Any:
            SECONDS.update(dict.fromkeys(SECONDS, 0.0))
            answer = function(*arguments)
            out.with_name(f"{out.stem}.{os.getpid()}").write_text(json.dumps(SECONDS))
            return answer

        return original(measured, *arguments)

    patched.fork = fork


def main() -> None:
    """Run the program, and write the seconds of each kind to the file that is named first."""
    out, words = Path(sys.argv[1]), sys.argv[2:]
    for owner, name, kind in MEASURED:
        measure(owner, name, kind)
    measure_forks(out)
    status = 1
    try:
        cli.main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        for part in out.parent.glob(f"{out.stem}.[0-9]*"):
            for kind, seconds in json.loads(part.read_text()).items():
                SECONDS[kind] += seconds
        out.write_text(json.dumps(SECONDS))
        sys.stdout.flush()
        os._exit(status)  # as the program does, which does not clear up


if __name__ == "__main__":
    main()
