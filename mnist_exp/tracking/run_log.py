"""What a run records, into its journal and its folder. Nothing here knows MLflow.

An entry of the journal is what is to be said to MLflow, in MLflow's own terms, at its own time:

    begin     key, name, uri, experiment, tags, parent (a folder, or ""), owner
    resume    owner
    params, tags, dataset
    metrics   step, values
    artifact  path (in the run's folder), to (a folder of the artifacts, or "")
    model     path (of a saved MLflow model, in the run's folder)
    end       status, reason
"""

import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mnist_exp.errors import ConfigError
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import Journal, OpenRun, OpenRuns

if TYPE_CHECKING:  # every verb looks for runs that were killed, and most have no other use for it
    import numpy as np

log = logging.getLogger(__name__)

STATUSES = ("FINISHED", "FAILED", "KILLED")
_RESERVE = ".reserve"  # a file whose removal makes room for the last lines, on a full disk
_RESERVE_BYTES = 16_384
_THUMBNAIL = 256  # pixels of the longer side of what the UI shows in a list; MLflow's own


@dataclass(frozen=True)
class Beginning:
    """What a run's record starts with."""

    name: str
    uri: str  # of the store that it is for
    experiment: str
    tags: Mapping[str, str]
    parent: Path | None = None  # the folder of the sweep that it belongs to
    kind: str = "run"


@dataclass(frozen=True)
class RunHistory:
    """What a journal says so far."""

    key: str = ""  # '' where nothing has begun
    name: str = ""
    uri: str = ""
    experiment: str = ""
    parent: str = ""  # the folder of its sweep
    began: int = 0  # ms since 1970
    owner: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    # key -> step -> value, in the order in which they were recorded
    metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    status: str = ""  # '' while it runs
    reason: str = ""

    @classmethod
    def of(cls, folder: Path) -> "RunHistory":
        entries, _ = journal.read(folder)  # of a damaged line, who delivers it says so
        begin: Mapping[str, Any] = {}
        found: dict[str, Any] = {"status": "", "reason": ""}
        tags: dict[str, str] = {}
        metrics: dict[str, dict[int, float]] = {}
        for entry in entries:
            fields = entry.fields
            if entry.kind == "begin":
                begin, tags = fields, dict(fields["tags"])
                found["began"] = entry.time
            if entry.kind in ("begin", "resume"):
                found |= {"owner": fields["owner"], "status": "", "reason": ""}
            elif entry.kind == "tags":
                tags |= fields["values"]
            elif entry.kind == "metrics":
                for key, value in fields["values"].items():
                    metrics.setdefault(key, {})[fields["step"]] = value
            elif entry.kind == "end":
                found |= {"status": fields["status"], "reason": fields["reason"]}
        for name in ("key", "name", "uri", "experiment", "parent"):
            found[name] = begin.get(name, "")
        return cls(**found, tags=tags, metrics=metrics)

    def newest(self) -> dict[str, float]:
        """The newest value of each metric."""
        return {key: points[max(points)] for key, points in self.metrics.items()}

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        return sorted(self.metrics.get(key, {}).items())


class RunWriter:
    """The record of one run, while it is made. Its methods raise OSError where the disk fails."""

    def __init__(self, folder: Path, open_runs: OpenRuns, beginning: Beginning) -> None:
        """Begins the record of a run, or goes on with the one that the folder holds."""
        self.folder = folder
        owner = process_identity()
        with journal.lock(folder):
            story = RunHistory.of(folder)
            running = story.key and not story.status and story.owner != owner
            if running and is_running(story.owner) is not False:
                raise ConfigError(
                    f"{folder}: this run is not over: process {story.owner['pid']} on "
                    f"{story.owner['host']} trains it"
                )
            (folder / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))
            key = story.key or uuid.uuid4().hex
            open_runs.add(key, folder, owner, beginning.kind)  # first: what has begun can be found
            self.journal = Journal(folder)
            if story.key:
                self.journal.write("resume", owner=owner)
            else:
                self.journal.write(
                    "begin",
                    key=key,
                    name=beginning.name,
                    uri=beginning.uri,
                    experiment=beginning.experiment,
                    tags=dict(beginning.tags),
                    parent=str(beginning.parent.resolve()) if beginning.parent else "",
                    owner=owner,
                )
        self.seen = {(key, step) for key, points in story.metrics.items() for step in points}

    @classmethod
    def reopen(cls, folder: Path, open_runs: OpenRuns) -> Self:
        """To add to the record of a run that has ended, and stays so."""
        writer = cls.__new__(cls)
        writer.folder, writer.seen = folder, set()
        with journal.lock(folder):
            story = RunHistory.of(folder)
            open_runs.add(story.key, folder, story.owner, "run")
            writer.journal = Journal(folder)
        return writer

    def params(self, params: Mapping[str, Any]) -> None:
        self.journal.write("params", values={key: str(value) for key, value in params.items()})

    def dataset(self, facts: "RecordedDataset") -> None:
        """The dataset, as MLflow's dataset input of the run."""
        self.journal.write(
            "dataset",
            name=facts.name,
            source=facts.source,
            digest=facts.digest,
            shape=list(facts.shape),
            sizes=dict(facts.sizes),
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of metrics. What is there already, from before the run was resumed, stays."""
        new = {key: value for key, value in values.items() if (key, step) not in self.seen}
        if new:
            self.journal.write("metrics", step=step, values=new)
            self.seen |= {(key, step) for key in new}

    def image(self, key: str, pixels: "np.ndarray", step: int) -> None:
        """`pixels`: uint8 [H, W, 3]. One key and several steps give a slider in the UI.

        In files whose names are MLflow's own for images, as its `log_image` would make a second
        image where an answer was lost on the way.
        """
        from PIL import Image

        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        start = f"{key.replace('/', '~')}+step+{step}+timestamp+"
        # a resumed run draws what it has drawn before: under the same name it is the same image
        before = [path.stem for path in folder.glob(f"{start}*.png")]
        stem = before[0] if before else f"{start}{time.time_ns() // 1_000_000}+{uuid.uuid4()}"
        image = Image.fromarray(pixels)
        scale = _THUMBNAIL / max(image.size)
        small = image.resize((int(image.width * scale), int(image.height * scale)))
        for name, picture in ((f"{stem}.png", image), (f"{stem}+compressed.webp", small)):
            picture.save(folder / name)
            self.artifact(folder / name, "images")
        self.tags({"mlflow.loggedImages": "True"})

    def artifact(self, path: Path, to: str = "") -> None:
        """A file in the run's folder, as it is when it is delivered."""
        relative = str(path.resolve().relative_to(self.folder.resolve()))
        self.journal.write("artifact", path=relative, to=to)

    def text(self, text: str, name: str) -> None:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        self.artifact(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        self.journal.write("tags", values=dict(tags))

    def model(self, path: Path) -> None:
        """A model that was saved as MLflow does, in a folder of the run's."""
        self.journal.write("model", path=str(path.resolve().relative_to(self.folder.resolve())))

    def release_reserve(self) -> None:
        """For what is still to be said where the disk may be full: why the run ends."""
        (self.folder / _RESERVE).unlink(missing_ok=True)

    def end(self, status: str, reason: str = "") -> None:
        """FINISHED, FAILED or KILLED, for the record to be closed."""
        assert status in STATUSES, status
        self.release_reserve()
        self.journal.write("end", status=status, reason=reason[:5000])
        self.journal.sync()
        self.journal.close()


@dataclass(frozen=True)
class RecordedDataset:
    """What a run's record says of its dataset."""

    name: str
    source: str
    digest: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]  # split -> images


def open_runs_at(root: Path) -> OpenRuns:
    """The open runs under a project's root, or in the current folder."""
    return OpenRuns(root / "outputs" / ".open")


def open_histories(open_runs: OpenRuns) -> Iterator[tuple[OpenRun, RunHistory]]:
    """The open runs with their records; of one that cannot be read there is a warning."""
    for entry in open_runs.entries():
        try:
            yield entry, RunHistory.of(entry.folder)
        except OSError as error:
            log.warning("%s: its record is passed over: %s", entry.folder, error)


def mark_dead_runs(open_runs: OpenRuns) -> list[tuple[Path, RunHistory]]:
    """Ends the records of runs whose process died without a word: KILLED. Which, and their records.

    A run that is alive, or on another host, is left alone.
    """
    buried = []
    for entry, story in open_histories(open_runs):
        reason = f"its process ({entry.owner['pid']}) ended without a word"
        if story.status or is_running(entry.owner) is not False:
            continue
        try:
            if story.key and journal.mark_killed(entry.folder, entry.owner, reason):
                (entry.folder / _RESERVE).unlink(missing_ok=True)
                buried.append((entry.folder, RunHistory.of(entry.folder)))
            elif entry.folder.is_dir() and journal.size(entry.folder) == 0:
                open_runs.remove(entry.key)  # killed before it began; a folder may come back
        except OSError as error:  # a disk that is full, or read-only by now
            log.warning("%s: its run was killed, which cannot be recorded: %s", entry.folder, error)
    return buried
