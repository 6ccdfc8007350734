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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch._dynamo  # an optimizer imports it, which a forked process need not do again

from mnist_exp.cli import main as cli
from mnist_exp.config import paths
from mnist_exp.figures import curves, samples, style
from mnist_exp.run import recorder, train
from mnist_exp.run.trial import STEPS
from mnist_exp.system.processes import is_running
from mnist_exp.tracking import checkpoint, journal, uploader
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.training.step import TrainStep

BASE = [
    *("dataset.train_size=320", "dataset.val_size=200", "training.epochs=40"),
    *("training.device=cpu", "training.threads=1", "training.compile=never"),
    *("model.hidden=[16]", "optimizer=adam", "schedule=cosine", "tracking.flush_seconds=0"),
]
# what makes a step or an epoch depend on more than the weights
ALL_PARTS = [
    *("augmentation=elastic", "augmentation.erase=4", "augmentation.mixup=0.2"),
    *("model.dropout=0.1", "training.ema=2", "training.clip_norm=1", "training.decay_norms=false"),
    *("training.focus.after=3.5", "training.focus.hardest=0.5"),
]
TIMED = ("epoch_seconds", "images_per_second")  # what no two runs have alike
# nobody answers there, which leaves MLflow out: it takes seconds to import
NOBODY = "http://127.0.0.1:9"
# two stacks of two
GRID = [*BASE, f"tracking.uri={NOBODY}", "optimizer.lr=0.05,0.1", "training.batch_size=32,64"]
JOBS = 4
REGISTRY = "outputs"  # of open runs, in the folder of a forked process
KINDS = ("lost", "doubled", "differing")  # what a fault can do to a record
# of a run of BASE: its training steps, after those of the trial; its operations on files, once its
# record has begun
RANGES = {"exception": (1 + STEPS, 201 + STEPS), "file operation": (10, 400)}


# what forked programs leave out, where the name is looked up: it takes longer than all else in a
# small run, and in a process that was forked
LEFT_OUT: list[tuple[ModuleType, str]] = [
    (samples, "sample_grid"),
    (samples, "confusion_matrix"),
    (recorder, "learning_curves"),
    (curves, "sweep_curves"),
    (samples, "first_layer"),
]
# seconds that forked programs wait: they are over before the usual pause, and no server is there
WAITS: list[tuple[ModuleType, str, float]] = [
    (uploader, "PAUSE", 0.1),
    (train, "INTERRUPTED_SECONDS", 0.2),
]


def _nothing(*arguments: Any, **named: Any) -> None:
    pass


def _save_no_figure(figure: Any, path: str | Path) -> None:
    Path(path).write_bytes(b"a picture")


def _no_pixels(figure: Any) -> np.ndarray:
    return np.zeros((8, 8, 3), np.uint8)


def replacements(folder: Path) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """Return the module, the name and the replacement of each function in a forked program."""
    return [
        (paths, "output_root", lambda: folder),  # where the registry of open runs is
        (style, "save", _save_no_figure),
        (style, "pixels", _no_pixels),
        *((module, name, _nothing) for module, name in LEFT_OUT),
        (recorder, "recording_model", lambda *arguments: nullcontext()),
    ]


def replaced_calls(folder: Path) -> set[str]:
    """Return which replacements the programs in `folder` have called, as in "module.name"."""
    return set((folder / "replaced.txt").read_text().splitlines())


def _replace(module: ModuleType, name: str, function: Callable[..., Any], folder: Path) -> None:
    assert callable(getattr(module, name))
    label = f"{module.__name__}.{name}\n"
    notes = folder / "replaced.txt"

    def noted(*arguments: Any, **named: Any) -> Any:
        if not notes.exists() or label not in notes.read_text():
            with notes.open("a") as file:
                file.write(label)
        return function(*arguments, **named)

    setattr(module, name, noted)


class Forked:
    """A process that is `mnist-exp WORD ...`, forked from this one, which has torch at hand.

    It saves no MLflow model and draws no pictures. Its registry of open runs is in its folder.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Fork the process.

        Args:
            words: The command line, less the program's name.
            folder: Its current folder; what it prints is in `said.txt` there.
            prepare: Is called in the process, before all else.
        """
        self.text = folder / "said.txt"
        self.pid = os.fork()
        if self.pid == 0:
            try:
                prepare()
                self._run_program(words, folder)
            finally:
                os._exit(99)
        self.status: int | None = None

    def _run_program(self, words: Sequence[str], folder: Path) -> None:
        file = self.text.open("w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
        torch.set_num_threads(1)  # those of OpenMP are not there after a fork
        logging.getLogger().handlers.clear()
        for module, name, function in replacements(folder):
            _replace(module, name, function, folder)
        for module, name, seconds in WAITS:
            setattr(module, name, seconds)
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
        """Return its exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end, and return its exit status, negative for a signal."""
        self.until(lambda: False)
        assert self.status is not None
        return self.status

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, or the process has ended."""
        end = time.monotonic() + 60
        while self.poll() is None and not happened():
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"it hangs: {self.text.read_text()}")
            time.sleep(0.002)


@dataclass
class Fault:
    """A fault that happens to a run at a random moment of its life, and how the run ended of it.

    Attributes:
        name: A signal's; "exception", in a training step; "file operation", in which it is killed.
        random: What draws the moment.
        epochs: How many are recorded when it comes; None: any moment of three quarters of the run.
        status: The exit status, once it has happened.
        seconds: How long the process took to end.
    """

    name: str
    random: random.Random
    epochs: int | None = None
    status: int = 0
    seconds: float = 0.0


def words_of(folder: Path, *words: str) -> list[str]:
    """Return the overrides of a small run with its output in `folder`/the run."""
    return [*BASE, f"tracking.uri={NOBODY}", f"hydra.run.dir={folder}/the run", *words]


def reference(folder: Path, *words: str) -> Path:
    """Train the run that nothing happens to, with more overrides, and return its folder."""
    process = Forked(["train", *words_of(folder, *words)], folder)
    assert process.wait() == 0, process.text.read_text()
    return folder / "the run"


def interrupted_run(folder: Path, fault: Fault, *words: str) -> Path:
    """Train the same run with a fault, which is given its status, and return its folder."""
    run_folder, command = folder / "the run", ["train", *words_of(folder, *words)]
    within = {"exception": raise_in_step, "file operation": kill_in_file_operation}
    if fault.name in within:
        number = fault.random.randrange(*RANGES[fault.name])
        process = Forked(command, folder, lambda: within[fault.name](number))
        fault.status = process.wait()
        assert fault.status != 0, "it was over before its fault"
        return run_folder
    process = Forked(command, folder)
    process.until((run_folder / "journal.jsonl").exists)
    # of the run's own time, as a machine that is quick would else have ended it before
    wanted = fault.random.randrange(31) if fault.epochs is None else fault.epochs
    process.until(lambda: _epochs(run_folder) >= wanted)
    if fault.epochs is None:
        time.sleep(fault.random.uniform(0, 0.02))
    assert process.poll() is None, "it was over too soon"
    began = time.monotonic()
    process.send_signal(getattr(signal, fault.name))
    fault.status = process.wait()
    fault.seconds = time.monotonic() - began
    return run_folder


def reference_sweep(folder: Path) -> Path:
    """Train the sweep that nothing happens to, and return its folder."""
    process = Forked(["train", "-m", *GRID, f"hydra.sweep.dir={folder}/sweep"], folder)
    assert process.wait() == 0, process.text.read_text()
    return folder / "sweep"


def interrupted_sweep(folder: Path, fault: Fault) -> Path:
    """Train the same sweep, with a signal to its first process, and return its folder.

    The processes that it has forked end as well.
    """
    sweep_folder = folder / "cut"
    process = Forked(["train", "-m", *GRID, f"hydra.sweep.dir={sweep_folder}"], folder)
    jobs = [sweep_folder / str(n) for n in range(JOBS)]
    wanted = fault.random.randrange(35) if fault.epochs is None else fault.epochs
    process.until(lambda: any(_epochs(job) > wanted for job in jobs))
    process.send_signal(getattr(signal, fault.name))
    fault.status = process.wait()
    end = time.monotonic() + 10
    for owner in [owner for job in jobs if (owner := RunHistory.of(job).owner)]:
        while is_running(owner) and time.monotonic() < end:
            time.sleep(0.05)
    return sweep_folder


def raise_in_step(number: int) -> None:
    """Make the training step of this number raise, in this process."""
    call, done = TrainStep._call, itertools.count()

    def raising(own: TrainStep, indices: Any, keys: Any, *arguments: Any) -> Any:
        if number in {1 + next(done) for _ in keys}:
            raise RuntimeError("an injected fault")
        return call(own, indices, keys, *arguments)

    TrainStep._call = raising  # type: ignore[method-assign, assignment]


def kill_in_file_operation(number: int) -> None:
    """Have this process killed at its operation on files of this number, a write half done."""
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


def _epochs(folder: Path) -> int:
    return len(RunHistory.of(folder).metrics.get("train/loss", {}))


def resume(folder: Path, *words: str) -> str:
    """Resume a run or a sweep, and return what the program printed."""
    process = Forked(["resume", str(folder), *words], folder.parent)
    assert process.wait() == 0, process.text.read_text()
    return process.text.read_text()


def state_of(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run, in its own folder or in its stack's."""
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
    """Return in what a run's record and weights are not, to the last bit, those of another run.

    Each text begins with one of KINDS.
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
