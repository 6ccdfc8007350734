"""`python -m benchmarks.timed OUT.json VERB ...`: mnist-exp, and what it spent its time on.

Seconds, summed over the process and those that are forked from it for the stacks. Where one of the
measured functions calls another, the time is that of the outer one.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_exp import cli, results, stacked, step, tracking

SECONDS = dict.fromkeys(("runs", "parent", "store", "compile", "steps"), 0.0)
_running: list[str] = []


def timed(owner: Any, name: str, kind: str) -> None:
    """Adds the time in `owner.name` to that of its kind."""
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def measured(*arguments: Any, **named: Any) -> Any:
        if _running:
            return original(*arguments, **named)
        _running.append(name)
        began = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            _running.pop()
            SECONDS["parent" if _concluding and kind == "runs" else kind] += (
                time.perf_counter() - began
            )

    setattr(owner, name, measured)


_concluding: list[bool] = []


def main() -> None:
    out, words = Path(sys.argv[1]), sys.argv[2:]
    for name in ("params", "dataset", "metrics", "image", "artifact", "text", "tags", "model",
                 "flush", "finish"):  # fmt: skip
        timed(tracking.Tracker, name, "runs")
    for name in ("start_run", "experiment", "children", "history", "fetch", "get", "delete"):
        timed(tracking.Store, name, "runs")
    timed(tracking.Store, "__init__", "store")
    timed(step.TrainStep, "compile", "compile")
    timed(step.TrainStep, "__call__", "steps")
    conclude = results.conclude

    def concluding(*arguments: Any) -> Any:
        _concluding.append(True)
        return conclude(*arguments)

    train_there = stacked._train_there

    def training_there(*arguments: Any) -> None:
        SECONDS.update(dict.fromkeys(SECONDS, 0.0))
        train_there(*arguments)
        out.with_name(f"{out.stem}.{os.getpid()}").write_text(json.dumps(SECONDS))

    results.conclude = concluding
    stacked._train_there = training_there
    try:
        cli.main(words)
    finally:
        for part in out.parent.glob(f"{out.stem}.[0-9]*"):
            for kind, seconds in json.loads(part.read_text()).items():
                SECONDS[kind] += seconds
        out.write_text(json.dumps(SECONDS))


if __name__ == "__main__":
    main()
