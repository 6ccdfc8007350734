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
from mnist_exp.runs import recorder as record
from mnist_exp.sweeps import launcher
from mnist_exp.tracking import store as tracking
from mnist_exp.tracking import upload
from mnist_exp.training import step

SECONDS = dict.fromkeys(("runs", "model", "store", "compile", "steps"), 0.0)
_inside = threading.local()


def timed(owner: Any, name: str, kind: str) -> None:
    """Adds the processor's time in `owner.name`, of the thread that calls it, to that of its kind.

    Processor time, as a thread in the background mostly waits for those that train.
    """
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def measured(*arguments: Any, **named: Any) -> Any:
        if getattr(_inside, "is", False):
            return original(*arguments, **named)
        _inside.__dict__["is"] = True
        began = time.thread_time()
        try:
            return original(*arguments, **named)
        finally:
            _inside.__dict__["is"] = False
            SECONDS[kind] += time.thread_time() - began

    setattr(owner, name, measured)


def main() -> None:
    out, words = Path(sys.argv[1]), sys.argv[2:]
    timed(upload, "upload_journal", "runs")
    timed(record, "record_model", "model")
    timed(tracking.Store, "__init__", "store")
    timed(step.TrainStep, "compile", "compile")
    timed(step.TrainStep, "__call__", "steps")
    worker = launcher.worker

    def timed_worker(*arguments: Any) -> Any:
        SECONDS.update(dict.fromkeys(SECONDS, 0.0))
        results = worker(*arguments)
        out.with_name(f"{out.stem}.{os.getpid()}").write_text(json.dumps(SECONDS))
        return results

    setattr(launcher, worker.__name__, timed_worker)
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
