"""`python -m benchmarks.many_runs`: a store of 1,000 runs and 40 sweeps, and what lists them take.

The runs are made up, but recorded as real ones are: a journal in a folder of its own each, uploaded
to an SQLite store.
"""

import argparse
import functools
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from omegaconf import DictConfig

from benchmarks.measure import ROUNDS, environment
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity, leaves, task_config
from mnist_exp.tracking import waiting
from mnist_exp.tracking.run_log import OpenRuns, RunWriter
from mnist_exp.tracking.store import Store

SWEEPS, RUNS, JOBS, EPOCHS = 40, 200, 20, 10
RATES = ("0.003", "0.01", "0.03", "0.1", "0.3")
# mnist-exp, with its outputs in the folder that is the first argument
_PROGRAM = """import pathlib, sys
from mnist_exp.config import paths
root = pathlib.Path(sys.argv.pop(1))
sys.argv[0], paths.output_root = "mnist-exp", lambda: root
from mnist_exp.cli.main import program
program()
"""
VERSIONS = {"version.python": "3.11.9", "version.torch": "2.13.0", "version.mnist_exp": "0.1.0"}


def make(folder: Path, sweeps: int = SWEEPS, runs: int = RUNS) -> None:
    """Record made-up sweeps and runs in a folder, and upload them to a store there.

    Args:
        folder: The folder, for outputs/ and mlflow.db.
        sweeps: How many sweeps, of 20 jobs each.
        runs: How many runs beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uri, open_runs = f"sqlite:///{folder}/mlflow.db", OpenRuns(folder / "outputs" / ".open")
    rng = random.Random(0)
    for number in range(sweeps):
        _record_sweep(folder / "outputs" / "sweeps" / str(number), open_runs, uri, rng)
    for number in range(runs):
        words = [f"optimizer.lr={rng.choice(RATES)}", f"seed={number}"]
        words += [f"model={rng.choice(('mlp', 'linear', 'cnn'))}"]
        place = folder / "outputs" / "runs" / str(number)
        _record(place, open_runs, uri, words, {}, None, rng)
    _, problems = waiting.deliver(open_runs)
    if problems:
        raise RuntimeError(f"not delivered: {problems}")


def _record_sweep(folder: Path, open_runs: OpenRuns, uri: str, rng: random.Random) -> None:
    """Record a sweep of five learning rates and four seeds."""
    folder.mkdir(parents=True)
    parent = RunWriter.begin(
        folder,
        open_runs,
        name=f"sweep lr x seed ({JOBS} jobs)",
        uri=uri,
        experiment="mnist-exp",
        tags={"sweep": "true", "jobs": str(JOBS), "output_dir": str(folder), **VERSIONS},
    )
    parent.params({"sweep.optimizer.lr": ",".join(RATES), "sweep.seed": "0,1,2,3"})
    best = 0.0
    for number in range(JOBS):
        values = {"optimizer.lr": RATES[number // 4], "seed": str(number % 4)}
        words = [f"{key}={value}" for key, value in values.items()]
        tags = {"job": str(number), "swept": json.dumps(values)}
        best = max(best, _record(folder / str(number), open_runs, uri, words, tags, folder, rng))
    parent.metrics({"jobs/finished": JOBS, "jobs/not_finished": 0, "best/val_accuracy": best}, 0)
    parent.end("FINISHED")


@functools.cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    return compose([*words, f"training.epochs={EPOCHS}"])


def _record(
    folder: Path,
    open_runs: OpenRuns,
    uri: str,
    words: Sequence[str],
    tags: Mapping[str, str],
    parent: Path | None,
    rng: random.Random,
) -> float:
    """Record a run, and return its best validation accuracy.

    Args:
        folder: Its output folder.
        open_runs: The registry it is added to.
        uri: The store that it is for.
        words: The overrides of its config.
        tags: More tags than all have.
        parent: The folder of its sweep, if any.
        rng: Draws its accuracies.
    """
    composed = _composed(tuple(word for word in words if not word.startswith("seed=")))
    config = task_config(composed)
    config.seed = int(dict(word.split("=") for word in words)["seed"])
    model = str(composed.hydra.runtime.choices.model)
    folder.mkdir(parents=True)
    own = {"model": model, "optimizer": "sgd", "dataset": "mnist", "device": "cpu", "threads": "2"}
    own |= {"command_line": shlex.join(["mnist-exp", "train", *words]), **VERSIONS}
    own |= {"overrides": shlex.join(words), "config_hash": identity(config)}
    writer = RunWriter.begin(
        folder,
        open_runs,
        name=f"{model} sgd lr={config.optimizer.lr} bs=64 seed={config.seed}",
        uri=uri,
        experiment="mnist-exp",
        tags={**own, **tags, "output_dir": str(folder)},
        parent=parent,
    )
    writer.params(dict(leaves(config)))
    level, best = rng.uniform(0.9, 0.98), (0.0, 0)
    for epoch in range(1, EPOCHS + 1):
        accuracy = level - 0.1 * math.exp(-epoch) + rng.gauss(0, 0.001)
        best = max(best, (accuracy, epoch))
        values = {f"{split}/loss": 1 - accuracy for split in ("train", "val")}
        values |= {f"{split}/accuracy": accuracy for split in ("train", "val")}
        values |= {"lr": float(config.optimizer.lr), "epoch_seconds": 0.5}
        writer.metrics({**values, "images_per_second": 110_000.0}, epoch)
    if rng.random() < 0.02:
        writer.end("FAILED", "diverged: the training loss is nan in epoch 11")
        return 0.0
    writer.metrics({"best/val_accuracy": best[0], "best/epoch": best[1]}, EPOCHS)
    writer.metrics({"test/accuracy": level - 0.002, "test/loss": 1 - level}, EPOCHS)
    writer.end("FINISHED")
    return best[0]


def commands(folder: Path) -> dict[str, Sequence[str]]:
    """Return the words of the commands that are timed, by what the page calls them."""
    runs = [run.id[:12] for run in Store(f"sqlite:///{folder}/mlflow.db").of_kind(False)[:2]]
    condition = "optimizer.lr>0.05 and model=cnn and status=failed"
    return {
        "runs": ["runs"],
        f"runs '{condition}'": ["runs", condition],
        "runs SWEEP": ["runs", "last"],
        "runs --all --json": ["runs", "--all", "--json"],
        "status": ["status"],
        "compare RUN RUN": ["compare", *runs],
        "export --to FILE.parquet": ["export", "--to", f"{folder}/all.parquet", "--force"],
        "gc --dry-run": ["gc", "--dry-run"],
    }


def time_command(folder: Path, words: Sequence[str], **variables: str) -> float:
    """Return the seconds of a command whose outputs and store are in a folder."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), *words],
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def time_completion(folder: Path) -> float:
    """Return the seconds from TAB to the candidates for a field of runs."""
    line = "mnist-exp runs optim"
    with NamedTemporaryFile() as answer:
        variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line}
        variables |= {"_ARGCOMPLETE_COMP_WORDBREAKS": " =", "_ARGCOMPLETE_IFS": "\n"}
        variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": answer.name, "COMP_POINT": str(len(line))}
        seconds = time_command(folder, [], **variables)
        if "optimizer.lr" not in Path(answer.name).read_text():
            raise ValueError("TAB has offered no field")
    return seconds


def measure(folder: Path) -> dict[str, float]:
    """Return the medians of the seconds that the commands take, by their names."""
    medians = {
        name: statistics.median(time_command(folder, words) for _ in range(ROUNDS))
        for name, words in commands(folder).items()
    }
    medians["TAB behind `runs optim`"] = statistics.median(
        time_completion(folder) for _ in range(ROUNDS)
    )
    return medians


def main() -> None:
    """Make the store, unless it is there, and print how long the commands take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the store and of the runs")
    folder = parser.parse_args().folder.resolve()
    if not (folder / "mlflow.db").exists():
        make(folder)
    for name, seconds in measure(folder).items():
        print(f"{seconds:6.2f} s  {name}")


if __name__ == "__main__":
    main()
