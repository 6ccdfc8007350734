"""Runs that are stopped at random moments, resumed, and compared with one that was not."""

import itertools
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it, which a forked process need not do again

from mnist_exp.cli import main as cli
from mnist_exp.config import paths
from mnist_exp.figures import samples, style
from mnist_exp.runs import recorder as record
from mnist_exp.runs import train as run
from mnist_exp.sweeps import results
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import checkpoint, journal, upload
from mnist_exp.tracking.run_log import RunHistory
from mnist_exp.training.step import TrainStep

BASE = [
    *("dataset.train_size=320", "dataset.val_size=200", "training.epochs=40"),
    *("training.device=cpu", "training.threads=1", "training.compile=never"),
    *("model.hidden=[16]", "optimizer=adam", "schedule=cosine", "tracking.flush_seconds=0"),
]
TIMED = ("epoch_seconds", "images_per_second")  # what no two runs have alike
# nobody answers there, which leaves MLflow out: it takes seconds to import
NOBODY = "http://127.0.0.1:9"
# two stacks of two
GRID = [*BASE, f"tracking.uri={NOBODY}", "optimizer.lr=0.05,0.1", "training.batch_size=32,64"]
JOBS = 4
KINDS = ("lost", "doubled", "differing")  # what a fault can do to a record
# of a run of BASE: its training steps; its operations on files, once its record has begun
RANGES = {"exception": (1, 201), "file operation": (10, 400)}


class Forked:
    """`mnist-exp WORD ...` as a process that is forked from this one, which has torch at hand.

    It saves no MLflow model and draws no pictures, which take longer than all else in a small run.
    Its registry of open runs is in its folder.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, meddle: Callable[[], None] = lambda: None
    ) -> None:
        """`meddle`: is called in the process, before all else."""
        self.text = folder / "said.txt"
        self.pid = os.fork()
        if self.pid == 0:
            try:
                meddle()
                self._be(words, folder)
            finally:
                os._exit(99)
        self.status: int | None = None

    def _be(self, words: Sequence[str], folder: Path) -> None:
        file = self.text.open("w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
        torch.set_num_threads(1)  # those of OpenMP are not there after a fork
        logging.getLogger().handlers.clear()
        paths.output_root = lambda: folder  # where the registry of open runs is
        upload.PAUSE = 0.1  # seconds: such a run is over before the usual pause
        run.INTERRUPTED_SECONDS = 0.2  # for a server that is not there
        figures = [
            (samples, "sample_grid"),
            (samples, "confusion_matrix"),
            (record, "learning_curves"),
            (results, "sweep_curves"),
        ]
        for owner, name in (*figures, (record, "record_model")):
            setattr(owner, name, lambda *arguments, **more: None)
        style.save = _save_no_figure
        style.pixels = lambda figure: np.zeros((8, 8, 3), np.uint8)
        status = 99
        try:
            cli.main(list(words))
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc(file=file)
        file.flush()
        os._exit(status)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        self.until(lambda: False)
        assert self.status is not None
        return self.status

    def until(self, happened: Callable[[], bool]) -> None:
        """Returns once something has happened, or it has ended."""
        end = time.monotonic() + 60
        while self.poll() is None and not happened():
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"it hangs: {self.text.read_text()}")
            time.sleep(0.002)


def _save_no_figure(figure: Any, path: str | Path) -> None:
    Path(path).write_bytes(b"a picture")


@dataclass
class Fault:
    """What happens to a run, at a random moment of its life.

    name: of a signal; "exception", in a training step; "file operation", in which it is killed.
    """

    name: str
    random: random.Random
    epochs: int | None = None  # recorded when it comes; None: any moment of three quarters of it
    status: int = 0  # as the process has ended
    seconds: float = 0.0  # that it took to end


def words_of(folder: Path, *words: str) -> list[str]:
    return [*BASE, f"tracking.uri={NOBODY}", f"hydra.run.dir={folder}/the run", *words]


def reference(folder: Path) -> Path:
    """The run that nothing happens to."""
    process = Forked(["train", *words_of(folder)], folder)
    assert process.wait() == 0, process.text.read_text()
    return folder / "the run"


def interrupted_run(folder: Path, fault: Fault) -> Path:
    """The same run, with a fault."""
    own = folder / "the run"
    within = {"exception": raise_in_step, "file operation": kill_in_file_operation}
    if fault.name in within:
        number = fault.random.randrange(*RANGES[fault.name])
        process = Forked(["train", *words_of(folder)], folder, lambda: within[fault.name](number))
        fault.status = process.wait()
        return own
    process = Forked(["train", *words_of(folder)], folder)
    process.until((own / "journal.jsonl").exists)
    # of the run's own time, as a machine that is quick would else have ended it before
    wanted = fault.random.randrange(31) if fault.epochs is None else fault.epochs
    process.until(lambda: _epochs(own) >= wanted)
    if fault.epochs is None:
        time.sleep(fault.random.uniform(0, 0.02))
    assert process.poll() is None, "it was over too soon"
    began = time.monotonic()
    process.send_signal(getattr(signal, fault.name))
    fault.status = process.wait()
    fault.seconds = time.monotonic() - began
    return own


def reference_sweep(folder: Path) -> Path:
    """The sweep that nothing happens to."""
    process = Forked(["train", "-m", *GRID, f"hydra.sweep.dir={folder}/sweep"], folder)
    assert process.wait() == 0, process.text.read_text()
    return folder / "sweep"


def interrupted_sweep(folder: Path, fault: Fault) -> Path:
    """The same sweep, with a signal to its first process; those that it has forked end as well."""
    own = folder / "cut"
    process = Forked(["train", "-m", *GRID, f"hydra.sweep.dir={own}"], folder)
    jobs = [own / str(n) for n in range(JOBS)]
    wanted = fault.random.randrange(35) if fault.epochs is None else fault.epochs
    process.until(lambda: any(_epochs(job) > wanted for job in jobs))
    process.send_signal(getattr(signal, fault.name))
    fault.status = process.wait()
    end = time.monotonic() + 10
    for owner in [owner for job in jobs if (owner := RunHistory.of(job).owner)]:
        while is_running(owner) and time.monotonic() < end:
            time.sleep(0.05)
    return own


def raise_in_step(number: int) -> None:
    """The training step of this number raises."""
    step, numbers = TrainStep._step, itertools.count(1)

    def raising(*arguments: Any, **more: Any) -> Any:
        if next(numbers) == number:
            raise RuntimeError("an injected fault")
        return step(*arguments, **more)

    TrainStep._step = raising  # type: ignore[method-assign]


def kill_in_file_operation(number: int) -> None:
    """The process is killed at its operation on files of this number; a write is half done then."""
    numbers = itertools.count(1)

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(numbers) == number:
                if operation is write:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **more)

        return call

    write = os.write
    for owner, name in ((os, "write"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
        setattr(owner, name, counted(getattr(owner, name)))


def _epochs(own: Path) -> int:
    return len(RunHistory.of(own).metrics.get("train/loss", {}))


def resume(folder: Path) -> str:
    """What it says."""
    process = Forked(["resume", str(folder)], folder.parent)
    assert process.wait() == 0, process.text.read_text()
    return process.text.read_text()


def state_of(folder: Path) -> dict[str, Any]:
    own = RunHistory.of(folder).tags["config_hash"]
    places = [folder, *sorted((folder.parent / ".stacks").glob("*"))]
    for place in places:
        state, problems = checkpoint.newest(
            place, lambda found: "" if own in found["configs"] else "of another stack"
        )
        assert all("of another stack" in problem for problem in problems), problems
        if state is not None:
            return state
    raise AssertionError(f"{folder}: no state")


def differences(folder: Path, other: Path) -> list[str]:
    """In what a record, and all that training leaves, is not to the last bit that of another run.

    Each begins with one of KINDS.
    """
    a, b = RunHistory.of(folder), RunHistory.of(other)
    found = [] if a.status == b.status == "FINISHED" else [f"lost: status {a.status} {b.status}"]
    for key in sorted({*a.metrics, *b.metrics}):
        if a.metrics.get(key, {}).keys() != b.metrics.get(key, {}).keys():
            found.append(f"lost: {key}, {a.history(key)} and {b.history(key)}")
        elif key not in TIMED and a.history(key) != b.history(key):
            found.append(f"differing: {key}, {a.history(key)} and {b.history(key)}")
    found += [f"doubled: {point}" for point in _doubled(folder)]
    x, y = (checkpoint.load(f / "checkpoint.pt")["model"] for f in (folder, other))
    found += [f"differing: weights {key}" for key in x if not torch.equal(x[key], y[key])]
    states = [state_of(f)["core"]["step"]["carried"] for f in (folder, other)]
    if len(states[0]) != len(states[1]) or not all(map(torch.equal, *states)):
        found.append("differing: parameters, buffers or the optimizer's memory")
    return found


def _doubled(folder: Path) -> Iterator[tuple[str, int]]:
    seen = set()
    for entry in journal.read(folder)[0]:
        if entry.kind == "metrics":
            for key in entry.fields["values"]:
                point = key, entry.fields["step"]
                if point in seen:
                    yield point
                seen.add(point)
