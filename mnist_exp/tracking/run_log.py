"""What a run records, into its journal and its folder, and which runs are open.

Nothing here needs MLflow. An entry of the journal is what is to be said to MLflow, in MLflow's own
terms, at its own time:

    begin     key, name, uri, experiment, tags, parent (a folder, or ""), owner
    resume    owner
    store     uri (of another store, from here on)
    params, tags, dataset
    metrics   step, values
    artifact  path (in the run's folder), to (a folder of the artifacts, or ""), sha256
    model     path (of a saved MLflow model, in the run's folder)
    end       status, reason
"""

import errno
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mnist_exp.errors import ConfigError
from mnist_exp.system import files
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking import journal, mlflow_internals
from mnist_exp.tracking.journal import Journal, RunHistory

if TYPE_CHECKING:  # every verb looks for runs that were killed, and most have no other use for it
    import numpy as np

log = logging.getLogger(__name__)

_RESERVE = ".reserve"  # a file whose removal makes room for the last lines, on a full disk
_RESERVE_BYTES = 16_384
_LAST_SECONDS = 2.0  # that the last lines wait for room which others have taken


@dataclass(frozen=True)
class OpenRun:
    """A run that has not ended, or that MLflow does not have whole."""

    key: str
    folder: Path  # absolute
    owner: dict[str, Any]  # the process that began or last resumed it, by its identity


class OpenRuns:
    """The registry of the runs that are not both ended and uploaded: a folder with a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, key: str, folder: Path, owner: Mapping[str, Any]) -> None:
        """Add a run, or replace the one of this key. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark(key).unlink(missing_ok=True)
        content = {"folder": str(folder.resolve()), "owner": dict(owner)}
        files.write(self.folder / f"{key}.json", json.dumps(content))

    def remove(self, key: str) -> None:
        """Take out a run, if it is there. Raises OSError."""
        (self.folder / f"{key}.json").unlink(missing_ok=True)
        self._mark(key).unlink(missing_ok=True)

    def mark_warned(self, key: str) -> None:
        """Remember that a person was told why a run's store does not have it."""
        with suppress(OSError):  # then it is told again
            self._mark(key).touch()

    def was_warned(self, key: str) -> bool:
        """Return whether a person was told why a run's store does not have it."""
        return self._mark(key).exists()

    def _mark(self, key: str) -> Path:
        return self.folder / f"{key}.told"

    def entries(self) -> list[OpenRun]:
        """Return all runs by their key, but for those that, with a warning each, are unreadable."""
        runs = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                folder, owner = content["folder"], content["owner"]
                if [type(owner[name]) for name in ("host", "pid", "born")] != [str, int, str]:
                    raise ValueError(f"the owner {owner}")
                runs.append(OpenRun(path.stem, Path(folder), owner))
            except FileNotFoundError:  # removed by another process
                continue
            # whatever a file can hold that is not an entry
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"
                log.warning("%s: passed over, as it is not readable: %s", path, reason)
        return runs


class RunWriter:
    """The record of one run, open for writing. Its methods raise OSError where the disk fails."""

    def __init__(self, folder: Path, journal: Journal, history: RunHistory) -> None:
        """Make a writer; `begin` and `reopen` open the journal that it needs."""
        self.folder, self.journal, self._is_ending = folder, journal, False
        self._recorded = {(key, step) for key, points in history.metrics.items() for step in points}

    @classmethod
    def begin(
        cls,
        folder: Path,
        open_runs: OpenRuns,
        *,
        name: str,
        uri: str,
        experiment: str,
        tags: Mapping[str, str],
        parent: Path | None = None,
    ) -> Self:
        """Begin the record of a run, or go on with the one that the folder holds.

        Args:
            folder: Of the run; it is there.
            open_runs: The registry that the run is added to.
            name: Of the run in MLflow.
            uri: The store that it is for.
            experiment: The name of MLflow's experiment.
            tags: The first ones; more can follow.
            parent: The folder of the sweep that it belongs to.

        Raises ConfigError where another process is recording this run.
        """
        owner = process_identity()
        with journal.lock(folder):
            history = RunHistory.of(folder)
            is_open = history.key and not history.status
            if is_open and history.owner != owner and is_running(history.owner) is not False:
                raise ConfigError(
                    f"{folder}: this run is not over: process {history.owner['pid']} on "
                    f"{history.owner['host']} trains it"
                )
            (folder / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))
            key = history.key or uuid.uuid4().hex
            open_runs.add(key, folder, owner)  # first: what has begun can be found
            writer = cls(folder, Journal(folder), history)
            if history.key:
                writer.journal.write("resume", owner=owner)
            else:
                writer.journal.write(
                    "begin",
                    key=key,
                    name=name,
                    uri=uri,
                    experiment=experiment,
                    tags=dict(tags),
                    parent=str(parent.resolve()) if parent else "",
                    owner=owner,
                )
        return writer

    @classmethod
    def reopen(cls, folder: Path, open_runs: OpenRuns) -> Self:
        """Open the record of a run that has ended, and stays so, to add to it.

        Raises ConfigError where the folder holds no record any more.
        """
        with journal.locked(folder) as history:
            open_runs.add(history.key, folder, history.owner)
            return cls(folder, Journal(folder), RunHistory())

    def params(self, params: Mapping[str, Any]) -> None:
        """Record the parameters of the run, as text."""
        self.journal.write("params", values={key: str(value) for key, value in params.items()})

    def dataset(self, description: Mapping[str, Any]) -> None:
        """Record a data set by its name, source, digest, shape of an image, and sizes of splits."""
        self.journal.write("dataset", **description)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record points of metrics. One that was there before the run was resumed stays."""
        new = {key: value for key, value in values.items() if (key, step) not in self._recorded}
        if new:
            self.journal.write("metrics", step=step, values=new)
            self._recorded |= {(key, step) for key in new}

    def image(self, key: str, pixels: "np.ndarray", step: int) -> None:
        """Record an image. One key and several steps give a slider in the UI.

        Its files have MLflow's own names for images, as its `log_image` would make a second image
        where an answer was lost on the way. pixels: uint8 [H, W, 3].
        """
        from PIL import Image

        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        start = mlflow_internals.image_stem(key, step)
        # a resumed run draws what it has drawn before: under the same name it is the same image
        before = [path.stem for path in folder.glob(f"{start}*.png")]
        stem = before[0] if before else f"{start}{time.time_ns() // 1_000_000}+{uuid.uuid4()}"
        image = Image.fromarray(pixels)
        scale = mlflow_internals.THUMBNAIL_PIXELS / max(image.size)
        small = image.resize((int(image.width * scale), int(image.height * scale)))
        for name, picture in zip(mlflow_internals.image_files(stem), (image, small), strict=True):
            # for the PNG and the WebP: half of the usual time, for a tenth more bytes
            picture.save(folder / name, compress_level=3, method=1)
            self.artifact(folder / name, "images")
        self.tags(mlflow_internals.LOGGED_IMAGES)

    def artifact(self, path: Path, to: str = "") -> None:
        """Record a file in the run's folder, as an artifact in the folder `to`, or at the top.

        It is uploaded as it is then.
        """
        digest = files.sha256(path)
        write = partial(_write_last, self.journal) if self._is_ending else self.journal.write
        write("artifact", path=self._relative(path), to=to, sha256=digest)

    def text(self, text: str, name: str) -> None:
        """Record a text as a file of this name."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        self.artifact(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record tags, in place of those of the same names."""
        self.journal.write("tags", values=dict(tags))

    def model(self, path: Path) -> None:
        """Record a model that was saved in MLflow's format, in a folder of the run's."""
        self.journal.write("model", path=self._relative(path))

    def _relative(self, path: Path) -> str:
        return str(path.resolve().relative_to(self.folder.resolve()))

    def release_reserve(self) -> None:
        """Make room for the last lines, where the disk may be full: why the run ends."""
        (self.folder / _RESERVE).unlink(missing_ok=True)
        self._is_ending = True

    def end(self, status: str, reason: str = "") -> None:
        """End the run, FINISHED, FAILED or KILLED, and close the record."""
        self.release_reserve()
        _write_last(self.journal, "end", status=status, reason=reason[:5000])
        self.journal.sync()
        self.journal.close()


def add_tags(
    folder: Path,
    open_runs: OpenRuns,
    change: Callable[[Mapping[str, str]], Mapping[str, str]],
) -> Mapping[str, str]:
    """Record tags of a run, which may have ended or be in training, and return them.

    Args:
        folder: Of the run.
        open_runs: The registry, which the run is in until its store has the tags.
        change: Returns the tags to record for those that the journal has. Nothing is recorded if
            that is none, or if it raises.

    Raises OSError where the disk fails, and ConfigError where the folder holds no record any more.
    """
    with journal.locked(folder) as history:
        tags = dict(change(history.tags))
        if not tags:
            return tags
        open_runs.add(history.key, folder, history.owner)  # first: what is written is delivered
        with closing(Journal(folder)) as file:
            file.write("tags", values=tags)
            file.sync()
        return tags


def open_runs_at(root: Path) -> OpenRuns:
    """Return the registry of the open runs under the folder that all output goes to."""
    return OpenRuns(root / "outputs" / ".open")


def open_histories(open_runs: OpenRuns) -> Iterator[tuple[OpenRun, RunHistory]]:
    """Yield the open runs with their histories, and warn of those that cannot be read."""
    for run in open_runs.entries():
        try:
            yield run, RunHistory.of(run.folder)
        except OSError as error:
            log.warning("%s: its record is passed over: %s", run.folder, error)


def mark_killed(folder: Path, owner: Mapping[str, Any], reason: str) -> bool:
    """End the journal of a run whose process died without a word: KILLED, with the reason.

    Returns whether this call did it: not where the process may be alive, the run has ended, or the
    journal has another owner than the caller believes. Raises OSError.
    """
    # asked before reading: what a process that is dead by now has written is all there
    if is_running(owner) is not False or not (folder / journal.NAME).exists():
        return False
    return _mark(folder, owner, "KILLED", reason)


def mark_failed(folder: Path, reason: str) -> None:
    """End the journal of a run of this process that no recorder has ended: FAILED. Raises OSError.

    A run whose stack failed is open, until it is tried again alone, which may fail before that. One
    that another process trains, which is why it cannot be trained here, is left alone.
    """
    owner = process_identity()
    if RunHistory.of(folder).owner == owner:
        (folder / _RESERVE).unlink(missing_ok=True)
        _mark(folder, owner, "FAILED", reason)


def _mark(folder: Path, owner: Mapping[str, Any], status: str, reason: str) -> bool:
    """End a journal, unless it has ended or has another owner; return whether this call did it."""
    with journal.lock(folder):
        history = RunHistory.of(folder)
        if history.status or history.owner != dict(owner):
            return False
        with closing(Journal(folder)) as file:
            _write_last(file, "end", status=status, reason=reason)
            file.sync()
        return True


def _write_last(file: Journal, kind: str, **fields: Any) -> None:
    """Append one of the last entries of a run, also where others have taken the room made for it.

    Other runs write to the same disk. Each gives back what it has taken as soon as it fails.
    """
    late = time.monotonic() + _LAST_SECONDS
    while True:
        try:
            file.write(kind, **fields)
        except OSError as error:
            if error.errno != errno.ENOSPC or time.monotonic() > late:
                raise
            time.sleep(0.02)
        else:
            return


def mark_dead_runs(open_runs: OpenRuns) -> list[tuple[Path, RunHistory]]:
    """End the records of runs whose process died without a word, and return them.

    A run that is alive, or on another host, is left alone.
    """
    killed = []
    for run, history in open_histories(open_runs):
        reason = f"its process ({run.owner['pid']}) ended without a word"
        if history.status or is_running(run.owner) is not False:
            continue
        try:
            if history.key and mark_killed(run.folder, run.owner, reason):
                (run.folder / _RESERVE).unlink(missing_ok=True)
                killed.append((run.folder, RunHistory.of(run.folder)))
            elif run.folder.is_dir() and journal.size(run.folder) == 0:
                open_runs.remove(run.key)  # killed before it began; a folder may come back
        except OSError as error:  # a disk that is full, or read-only by now
            log.warning("%s: its run was killed, which cannot be recorded: %s", run.folder, error)
    return killed
