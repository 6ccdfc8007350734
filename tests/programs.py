"""Processes that run a few lines of Python on the package: writers, owners of runs, rivals."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.helpers import ROOT

Start = Callable[..., "subprocess.Popen[str]"]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """Starts Python with the lines of a program and its arguments; nothing outlives the block."""
    processes = []

    def start(program: str, *words: object) -> "subprocess.Popen[str]":
        modules = ("system.processes", "tracking.journal", "tracking.run_log")
        imports = "".join(f"from mnist_exp.{module} import *\n" for module in modules)
        program = f"import os, sys\nfrom contextlib import closing\n{imports}{program}"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def at_once(processes: Sequence["subprocess.Popen[str]"]) -> list[str]:
    """What processes print that say that they are ready, and wait for a line before they begin."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


READY = "print('ready', flush=True)\nsys.stdin.readline()\n"
OWNER = "import json\nprint(json.dumps(process_identity()), flush=True)\n"
WAIT = "sys.stdin.readline()\n"


def dead_owner(start: Start) -> dict[str, Any]:
    return dict(json.loads(start(OWNER).communicate(timeout=60)[0]))


def running_owner(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))
