"""Made-up records, as real runs leave them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mnist_exp.catalog.records import Record, load_records
from mnist_exp.tracking import waiting
from mnist_exp.tracking.run_log import OpenRuns, RunWriter
from tests.helpers import fresh_store


@dataclass(frozen=True)
class Recorded:
    """A store, and a folder with the registry of the runs that it does not have whole."""

    uri: str
    folder: Path
    open_runs: OpenRuns

    @classmethod
    def new(cls, folder: Path) -> "Recorded":
        """A new store, without runs."""
        return cls(fresh_store(folder), folder, OpenRuns(folder / "outputs" / ".open"))

    def run(
        self,
        name: str,
        params: Mapping[str, object],
        accuracies: Sequence[float] = (0.5, 0.9),
        *,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        end: str = "FINISHED",
        reason: str = "",
    ) -> RunWriter:
        """A run with a point of each metric an epoch; without `end` it goes on."""
        folder = self.folder / "outputs" / (parent or "") / name
        folder.mkdir(parents=True)
        writer = RunWriter.begin(
            folder,
            self.open_runs,
            name=name,
            uri=self.uri,
            experiment="tests",
            tags={"output_dir": str(folder), **(tags or {})},
            parent=self.folder / "outputs" / parent if parent else None,
        )
        writer.params({"training.epochs": 2, **params})
        for epoch, accuracy in enumerate(accuracies, start=1):
            points = {"train/loss": 1 - accuracy, "val/accuracy": accuracy}
            writer.metrics({**points, "images_per_second": 1000.0, "epoch_seconds": 2.0}, epoch)
        if end == "FINISHED":
            best = {"best/val_accuracy": max(accuracies), "best/epoch": 2}
            writer.metrics({**best, "test/accuracy": max(accuracies) - 0.01}, 2)
        if end:
            writer.end(end, reason)
        return writer

    def sweep(
        self, name: str, values: Sequence[Mapping[str, object]], *, end: str = "FINISHED"
    ) -> RunWriter:
        """A sweep and its jobs, which have all ended."""
        folder = self.folder / "outputs" / name
        folder.mkdir(parents=True)
        tags = {"sweep": "true", "jobs": str(len(values)), "output_dir": str(folder)}
        writer = RunWriter.begin(
            folder,
            self.open_runs,
            name=f"sweep {name}",
            uri=self.uri,
            experiment="tests",
            tags=tags,
        )
        for number, params in enumerate(values):
            swept = {key: str(value) for key, value in params.items()}
            own = {"job": str(number), "swept": json.dumps(swept)}
            self.run(str(number), params, (0.5, 0.8 + number / 100), tags=own, parent=name)
        if end:
            writer.metrics({"best/val_accuracy": 0.8, "jobs/finished": len(values)}, 0)
            writer.end(end)
        return writer

    def deliver(self) -> None:
        """Everything into the store."""
        _, problems = waiting.deliver(self.open_runs)
        assert problems == {}

    def load(self) -> list[Record]:
        """All records."""
        return load_records(self.uri, self.open_runs)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded.new(tmp_path)
