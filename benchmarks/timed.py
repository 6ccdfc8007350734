"""`python -m benchmarks.timed OUT.json VERB ...`: mnist-exp, and what it spent its time on.

Seconds of a processor, summed over the process and those that are forked from it.
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
from mnist_exp.run import model_export
from mnist_exp.tracking import upload, uploader
from mnist_exp.training import step

# where the name of each measured function is looked up, the name, and the kind of its work
MEASURED: list[tuple[Any, str, str]] = [
    (upload, "upload_journal", "upload"),
    (model_export, "save_model", "model"),
    (uploader, "import_mlflow", "import"),
    (step.TrainStep, "compile", "compile"),
    (step.TrainStep, "__call__", "steps"),
]
SECONDS = dict.fromkeys((kind for *_, kind in MEASURED), 0.0)  # of this process
_thread = threading.local()  # whether a measured function runs in it


def measure(owner: Any, name: str, kind: str, out: Path) -> None:
    """Replace `owner.name` by a function that adds its processor time to that of its kind.

    It is the time of the thread that calls it, and not of all the process. Each process writes its
    sums to a file of its own beside `out`, each time, as it may be killed.
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
            out.with_name(f"{out.stem}.{os.getpid()}").write_text(json.dumps(SECONDS))

    setattr(owner, name, measured)


def main() -> None:
    """Run the program, and write the seconds of each kind to the file that is named first."""
    out, words = Path(sys.argv[1]), sys.argv[2:]
    for owner, name, kind in MEASURED:
        measure(owner, name, kind, out)
    nothing = dict(SECONDS)
    os.register_at_fork(after_in_child=lambda: SECONDS.update(nothing))
    status = 1
    try:
        cli.main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        total = dict(nothing)
        for part in out.parent.glob(f"{out.stem}.[0-9]*"):
            for kind, seconds in json.loads(part.read_text()).items():
                total[kind] += seconds
        out.write_text(json.dumps(total))
        sys.stdout.flush()
        os._exit(status)  # as the program does, which does not clear up


if __name__ == "__main__":
    main()
