"""`python -m benchmarks.removal`: stop and rm, typed while a sweep runs in another process.

In a project of its own, made for this, a real sweep is started again and again, and one of the two
commands is typed at a random moment after its record has begun. What the sweep leaves, and what all
else in the project has become of, is compared with what was there before: no file may be lost or
changed that was not to go, and nothing may be left of what was.
"""

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import environment, machine
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import open_runs_at

ROOT = Path(__file__).resolve().parents[1]
LATEST = 8.0  # seconds after the record of the sweep has begun
START_SECONDS = 120.0  # that a sweep has to begin
SWEEP = ["train", "-m", "debug=fast", "seed=0,1", "optimizer.lr=0.1,0.2", "training.threads=1"]


class Project:
    """A folder in which the program is used as if it were installed."""

    def __init__(self, folder: Path) -> None:
        package = folder / "site" / "mnist_exp"
        shutil.copytree(ROOT / "mnist_exp", package)
        for name in ("conf", "experiments"):
            shutil.copytree(ROOT / name, package / name)
        self.folder = folder / "project"
        self.folder.mkdir()
        self.environment = environment(PYTHONPATH=str(package.parent))

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Type a command, and do not wait for its end."""
        return subprocess.Popen(
            [sys.executable, "-m", "mnist_exp", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, *words: str) -> tuple[int, str]:
        """Type a command, and return its exit status and what it prints."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def contents(self) -> dict[str, str]:
        """Return the digests of all files but the database, locks, and the registry's marks."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            ignored = path.suffix in (".lock", ".told") or name.startswith("mlflow.db")
            if path.is_file() and not ignored:
                found[name] = files.sha256(path)
        return found

    def rows(self) -> dict[str, list[Any]]:
        """Return the rows of all tables of the database."""
        with closing(sqlite3.connect(self.folder / "mlflow.db", timeout=30)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            return {
                name: sorted(map(repr, database.execute(f'SELECT * FROM "{name}"')))
                for (name,) in tables.fetchall()
            }


def one_try(project: Project, name: str, rng: random.Random) -> list[str]:
    """Start a sweep, type `stop` or `rm` at a random moment, and return what is wrong then."""
    before, rows_before = project.contents(), project.rows()
    sweep = project.start(*SWEEP, "training.epochs=3000")
    try:
        folder = _begun(project, sweep)
        time.sleep(rng.uniform(0, LATEST))
        key = RunHistory.of(folder).key
        wrong = []
        if name == "rm":
            wrong += _refused(project, folder, key)
        wrong += _stopped(project, sweep, folder, key)
    finally:
        sweep.kill()
        sweep.communicate()
    wrong += _lost(before, project.contents())
    status, output = project.type("rm", key, "--yes")
    if status:
        wrong.append(f"rm: exit status {status}, {output}")
    after = project.contents()
    wrong += [*_lost(before, after), *(f"left: {name}" for name in after if name not in before)]
    rows = project.rows()
    wrong += [f"rows of {t} differ" for t in rows if rows[t] != rows_before.get(t)]
    wrong += [f"left in the registry: {run}" for run in open_runs_at(project.folder).entries()]
    wrong += [f"left: {path}" for path in (project.folder / "outputs" / ".removed").glob("*")]
    return wrong


def _begun(project: Project, sweep: "subprocess.Popen[str]") -> Path:
    """Return the folder of the sweep once its record has begun."""
    late = time.monotonic() + START_SECONDS
    while time.monotonic() < late and sweep.poll() is None:
        for run in open_runs_at(project.folder).entries():
            history = RunHistory.of(run.folder)
            if history.key and not history.parent:
                return run.folder
        time.sleep(0.02)
    raise RuntimeError(f"the sweep has not begun: {sweep.poll()}")


def _refused(project: Project, folder: Path, key: str) -> list[str]:
    """Type `rm`, which has to be refused while the sweep runs, and return what is wrong."""
    status, output = project.type("rm", key, "--yes")
    if status != 2 or "is at work on it" not in output or not (folder / journal.NAME).exists():
        return [f"rm of a running sweep: exit status {status}, {output}"]
    return []


def _stopped(project: Project, sweep: "subprocess.Popen[str]", folder: Path, key: str) -> list[str]:
    """Type `stop`, and return what is wrong with what it leaves."""
    status, output = project.type("stop", key)
    wrong = [f"stop: exit status {status}, {output}"] if status else []
    histories = [RunHistory.of(path.parent) for path in folder.rglob(journal.NAME)]
    wrong += [f"{h.name}: its record has no end" for h in histories if not h.status]
    has_trained = any(history.epochs > 0 for history in histories)
    if has_trained and not list(folder.rglob("state-*.pt")):
        wrong.append("there is no checkpoint")
    try:
        sweep.wait(timeout=30)
    except subprocess.TimeoutExpired:
        wrong.append("the process of the sweep goes on")
    return wrong


def _lost(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return which files that were there before are gone, or have changed."""
    return [f"lost or changed: {name}" for name in before if after.get(name) != before[name]]


def main(times: int, seed: int) -> int:
    """Try both commands, print what came of it, and return the exit status."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        project = Project(Path(folder))
        for words in (["train", "debug=fast"], [*SWEEP[:3], "seed=5,6"]):  # that are to stay
            status, output = project.type(*words)
            assert status == 0, output
        for number in range(times):
            name = ("stop", "rm")[number % 2]
            wrong = one_try(project, name, rng)
            counts[name] += 1
            counts[f"{name}, something wrong"] += bool(wrong)
            print(
                f"{number + 1}/{times} {name}: {'; '.join(wrong) or 'as it has to be'}", flush=True
            )
    print(json.dumps(counts))
    print(machine())
    return 1 if any("wrong" in name and n for name, n in counts.items()) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.times, arguments.seed))
