"""The first minute with a command: when a terminal shows something, and what the command costs."""

import contextlib
import os
import pty
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks.measure import GRID, ROUNDS, environment, load_mnist

IMPORTS = "python -c 'import torch, mlflow'"  # what a command is compared with


@dataclass(frozen=True)
class Session:
    """A program as somebody at a terminal sees it, and what it has used."""

    output: Sequence[tuple[float, str]]  # its pieces, with the seconds since the start
    seconds: float
    cpu_seconds: float  # of the program and of those that it has started
    status: int

    @property
    def first_line(self) -> float:
        """The seconds until the terminal has got its first byte."""
        return self.output[0][0]

    def seen(self, text: str) -> float:
        """Return the seconds until a text was there."""
        shown = ""
        for seconds, piece in self.output:
            shown += piece
            if text in shown:
                return seconds
        raise ValueError(f"{text!r} was never shown, but {shown!r}")


def on_terminal(*command: str, **variables: str) -> Session:
    """Run a program on a terminal of its own, until its end.

    Args:
        command: The program and its arguments.
        variables: More of the environment.
    """
    terminal, side = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment(**variables)
    )
    os.close(side)
    output = []
    with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
        while piece := os.read(terminal, 2**16):
            output.append((time.perf_counter() - began, piece.decode(errors="replace")))
    os.close(terminal)
    _, status, use = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    return Session(output, seconds, use.ru_utime + use.ru_stime, process.returncode)


@dataclass(frozen=True)
class Cost:
    """The medians of what a command takes; a ratio is to the imports, of the same round."""

    first_line: float
    seconds: float
    seconds_ratio: float
    cpu_seconds: float
    cpu_ratio: float


def measure(rounds: int = ROUNDS) -> tuple[dict[str, Cost], float]:
    """Run the commands, which take turns with the bare imports.

    Return what each costs, by its name, and the seconds from the last epoch of a short run to its
    test accuracy.
    """
    with TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        for command in commands.values():  # what is loaded, and compiled by Python, is so for all
            _run(command)
        sessions = [{name: _run(c) for name, c in commands.items()} for _ in range(rounds)]
    costs = {}
    for name in commands:
        pairs = [(each[name], each[IMPORTS]) for each in sessions]
        costs[name] = Cost(
            statistics.median(own.first_line if own.output else 0.0 for own, _ in pairs),
            statistics.median(own.seconds for own, _ in pairs),
            statistics.median(own.seconds / bare.seconds for own, bare in pairs),
            statistics.median(own.cpu_seconds for own, _ in pairs),
            statistics.median(own.cpu_seconds / bare.cpu_seconds for own, bare in pairs),
        )
    runs = [each["train debug=fast"] for each in sessions]
    test = [run.seen("test accuracy") - run.seen("epoch 2/2  train") for run in runs]
    return costs, statistics.median(test)


def _commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by their names; the first ones make what the others look at."""
    image = folder / "digit.png"
    Image.fromarray(load_mnist().test.images[0, 0].numpy()).save(image)
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    program = [sys.executable, "-m", "mnist_exp"]
    # a folder of its own for each time: now is in the name
    run, sweep = (f"hydra.{kind}.dir={folder}/{kind}/${{now:%f}}" for kind in ("run", "sweep"))
    return {
        IMPORTS: [sys.executable, "-c", "import torch, mlflow"],
        "train debug=fast": [*program, "train", "debug=fast", store, run],
        "train -m debug=fast, 4 x 4": [*program, "train", "-m", "debug=fast", *GRID, store, sweep],
        "predict": [*program, "predict", "last", str(image), "--raw", store],
        "evaluate": [*program, "evaluate", "last", store, "--output", f"{folder}/figures"],
        "report": [*program, "report", "last", store],
    }


def _run(command: Sequence[str]) -> Session:
    session = on_terminal(*command)
    if session.status:
        raise SystemExit("".join(piece for _, piece in session.output))
    return session
