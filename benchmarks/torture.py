"""`make torture`: faults injected into real runs by the hundred, and what they have cost.

What the tests do, with ten times the counts. Each run that is interrupted is resumed and compared,
to the last bit, with one that nothing happened to; each record that a failing server has not taken
is synced and compared with what MLflow has in the end.
"""

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import machine
from benchmarks.page import write_torture
from mnist_exp.tracking import uploader
from mnist_exp.tracking.run_log import OpenRuns
from tests.faults.checkpoints import damage_is_refused, kill_save_anywhere
from tests.faults.delivery import MODES, MOMENTS, eight_writers, faults_in, recorded_through
from tests.faults.disk import (
    WRITES,
    fill_during_run,
    fill_during_sweep,
    goes_on_as,
    lost_or_doubled,
)
from tests.faults.interruptions import (
    ALL_PARTS,
    JOBS,
    KINDS,
    Fault,
    differences,
    interrupted_run,
    interrupted_sweep,
    reference,
    reference_sweep,
    resume,
)
from tests.faults.journals import damage_is_reported
from tests.faults.server import FaultyServer, Upstream

PROCESSES = 2
Injected = Callable[[int, Path], list[str]]  # the fault of this number, in this folder: its costs


def faults(
    whole: Path, whole_with_all_parts: Path, whole_sweep: Path, server: Upstream
) -> Mapping[str, tuple[int, Injected]]:
    """Return what is injected, by its name in the table, and how often."""

    def stopped(name: str, damaged: bool = False) -> Injected:
        def inject(number: int, folder: Path) -> list[str]:
            rng = random.Random(f"{name} {damaged} {number}")
            own = interrupted_run(folder, Fault(name, rng))
            if damaged:
                damage(own, rng)
            resume(own)
            return differences(own, whole)

        return inject

    def stopped_with_all_parts(number: int, folder: Path) -> list[str]:
        rng = random.Random(f"all parts {number}")
        own = interrupted_run(folder, Fault("SIGKILL", rng), *ALL_PARTS)
        resume(own)
        return differences(own, whole_with_all_parts)

    def stopped_sweep(number: int, folder: Path) -> list[str]:
        rng = random.Random(f"sweep {number}")
        own = interrupted_sweep(folder, Fault(rng.choice(["SIGKILL", "SIGINT"]), rng))
        resume(own)
        jobs = [differences(own / str(n), whole_sweep / str(n)) for n in range(JOBS)]
        return [text for found in jobs for text in found]

    def full_disk(number: int, folder: Path) -> list[str]:
        own, _ = fill_during_run(folder, random.Random(number).randrange(1, WRITES["run"]))
        return goes_on_as(own, [("", whole)])

    def full_disk_of_sweep(number: int, folder: Path) -> list[str]:
        own, _ = fill_during_sweep(folder, random.Random(number).randrange(1, WRITES["sweep"]))
        jobs = [(str(n), whole_sweep / str(n)) for n in range(JOBS)]
        return lost_or_doubled(goes_on_as(own, jobs, "--failed"))

    def server_fault(number: int, folder: Path) -> list[str]:
        mode, moment = MODES[number % len(MODES)], MOMENTS[number // len(MODES) % len(MOMENTS)]
        with FaultyServer(server.uri) as faulty:
            recorded_through(mode, moment, faulty, OpenRuns(folder / "open"), folder / "run")
        return faults_in(folder / "run", server.uri)

    def checked(test: Callable[[Path, int], object]) -> Injected:
        def inject(number: int, folder: Path) -> list[str]:
            test(folder, number)
            return []

        return inject

    return {
        "kill -9 at a random moment": (200, stopped("SIGKILL")),
        "kill -9 in an operation on files, a write half done": (200, stopped("file operation")),
        "Ctrl-C at a random moment": (50, stopped("SIGINT")),
        "SIGTERM at a random moment": (50, stopped("SIGTERM")),
        "exception in a random step": (50, stopped("exception")),
        "kill -9, and the newest checkpoint or the journal's end damaged": (
            200,
            stopped("SIGKILL", damaged=True),
        ),
        "run with augmentation, averaged weights and hard images: kill -9 at a random moment": (
            50,
            stopped_with_all_parts,
        ),
        "sweep of two stacks: kill -9 or Ctrl-C at a random moment": (20, stopped_sweep),
        "run on a disk that is full from a random write on": (100, full_disk),
        "sweep of two stacks on a disk that is full from a random write on": (
            20,
            full_disk_of_sweep,
        ),
        "checkpoint cut off, or a bit of it flipped": (2000, checked(damage_is_refused)),
        "journal cut off, or bytes of it changed": (2000, checked(damage_is_reported)),
        "every operation of a checkpoint's writing killed, and the power cut": (
            10,
            checked(lambda folder, number: kill_save_anywhere(folder, [1, 2])),
        ),
        "server refuses, hangs, answers 503 or loses its answer, at start, middle or end": (
            120,
            server_fault,
        ),
        "8 writers at once on one fresh store": (
            10,
            lambda number, folder: eight_writers(folder, f"sqlite:///{folder}/fresh.db"),
        ),
    }


def damage(own: Path, rng: random.Random) -> None:
    """Truncate a run's newest checkpoint, its digest or its journal, or flip a bit there."""
    states = sorted(own.glob("state-*.pt"))
    journal = own / "journal.jsonl"
    path = rng.choice([*states[-1:], *sorted(own.glob("state-*.sha256"))[-1:], journal])
    content = bytearray(path.read_bytes())
    if path == journal:  # what a power cut leaves: a torn end
        content += content[: rng.randrange(1, 60)].replace(b"\n", b" ")
    elif rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


_faults: Mapping[str, tuple[int, Injected]] = {}  # in each process that injects them


def _begin(faults: Mapping[str, tuple[int, Injected]]) -> None:
    global _faults
    _faults = faults


def _inject(name: str, number: int) -> list[str]:
    with TemporaryDirectory() as folder:
        try:
            return _faults[name][1](number, Path(folder))
        except Exception as error:  # whatever a fault can lead to
            return [f"differing: {type(error).__name__}: {error}"]


def rows(share: float, say: Callable[[str], None]) -> Iterator[tuple[str, int, Counter[str]]]:
    """Inject the faults, and yield the name, the count and the costs of each kind.

    Args:
        share: The part of the usual counts to inject, as in 0.1.
        say: Prints a line on what was lost, and on how long a kind took.
    """
    fork = multiprocessing.get_context("fork")  # each has torch at hand, and inherits the faults
    with TemporaryDirectory() as temporary, Upstream(Path(temporary)) as server:
        place = Path(temporary)
        other = place / "all parts"
        other.mkdir()
        runs = reference(place), reference(other, *ALL_PARTS)
        table = faults(*runs, reference_sweep(place), server)
        with ProcessPoolExecutor(PROCESSES, fork, _begin, (table,)) as pool:
            for name, (count, _) in table.items():
                count, costs, began = max(1, round(count * share)), Counter[str](), time.monotonic()
                answers = pool.map(_inject, [name] * count, range(count))
                for number, found in enumerate(answers):
                    costs.update({text.split(":")[0] for text in found})
                    for text in found:
                        say(f"{name}, {number}: {text}")
                say(f"{name}: {count} in {time.monotonic() - began:.0f} s")
                yield name, count, costs


def main() -> None:
    """Print the table of faults, and write it to a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts, as in 0.1")
    parser.add_argument("--output", type=Path, help="the Markdown file to write the table into")
    arguments = parser.parse_args()
    lines = [machine(), "", f"| fault | times injected | {' | '.join(KINDS)} |"]
    torch.set_num_threads(1)
    # the uploader looks often, and asks a server for a second at most
    uploader.PAUSE = 0.05
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    began = time.monotonic()
    found = list(rows(arguments.share, lambda text: print(text, flush=True)))
    seconds = time.monotonic() - began
    lines.append("| --- |" + " ---: |" * 4)
    for name, count, costs in found:
        lines.append(f"| {name} | {count:,} | {' | '.join(str(costs[k]) for k in KINDS)} |")
    text = "\n".join([*lines, "", f"Written by `make torture`, in {seconds / 60:.0f} minutes."])
    print(text)
    if arguments.output is not None:
        write_torture(arguments.output, text)
    sys.exit(any(costs.total() for *_, costs in found))


if __name__ == "__main__":
    main()
