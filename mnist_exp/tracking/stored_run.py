"""A run as a store has it."""

import contextlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import mlflow_internals
from mnist_exp.tracking.journal import EPOCH_METRIC, RunHistory
from mnist_exp.tracking.mlflow_internals import PARENT

T = TypeVar("T")

RUN_KEY = "run_key"  # the tag that tells which journal a run is made from


def sizes_of(profile: str) -> dict[str, int]:
    """Return the number of images of each split, from the profile that MLflow has of a data set."""
    try:
        sizes = json.loads(profile or "{}")
    except ValueError:  # of a data set that another program has recorded
        return {}
    if not isinstance(sizes, dict):
        return {}
    return {split: n for split, n in sizes.items() if type(n) is int and n > 0}


@dataclass(frozen=True)
class StoredRun:
    """A run as a store has it."""

    store_uri: str
    id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    experiment_id: str
    start_time: int  # ms since 1970
    end_time: int | None  # likewise; None before its end
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]  # the newest value of each
    epochs: int  # that are recorded
    dataset_digest: str  # the SHA-256 of the data that it was trained on, or ""
    artifact_uri: str  # where its artifacts are
    # split (train, val, test) -> the number of its images; empty where that is not on record
    dataset_sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_entity(cls, store_uri: str, entity: Any) -> "StoredRun":
        """Return the run that an entity of MLflow describes."""
        inputs = entity.inputs.dataset_inputs if entity.inputs else []
        digests = [tag.value for data in inputs for tag in data.tags if tag.key == "sha256"]
        profiles = [data.dataset.profile or "" for data in inputs]
        info, data = entity.info, entity.data
        return cls(
            store_uri=store_uri,
            id=info.run_id,
            name=info.run_name,
            status=info.status,
            experiment_id=info.experiment_id,
            start_time=info.start_time,
            end_time=info.end_time,
            tags=data.tags,
            params=data.params,
            metrics=data.metrics,
            epochs=mlflow_internals.newest_step(entity, EPOCH_METRIC),
            dataset_digest=digests[0] if digests else "",
            artifact_uri=info.artifact_uri,
            dataset_sizes=sizes_of(profiles[0]) if profiles else {},
        )

    @property
    def artifacts(self) -> Path | None:
        """The folder of its artifacts; None if they are not in the file system."""
        parts = urlsplit(self.artifact_uri)
        return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None

    @property
    def folder(self) -> Path:
        """The folder that the run was recorded in, on the machine that trained it."""
        return Path(self.tags.get("output_dir", ""))

    @property
    def key(self) -> str:
        """The key of its record, which its folder has as well, or ""."""
        return self.tags.get(RUN_KEY, "")

    @property
    def parent(self) -> str:
        """The id of the sweep's run that this one belongs to, or ""."""
        return self.tags.get(PARENT, "")

    @property
    def job(self) -> int | None:
        """The number of the sweep's job that this run is; None for any other run."""
        number = self.tags.get("job", "")
        return int(number) if number.isdecimal() else None

    def parsed_tag(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Return the parsed value of a tag, or `default`, or raise ConfigError if it is damaged."""
        text = self.tags.get(name)
        if text is None:
            return default
        try:
            return parse(text)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"run {self.id}: its tag {name} is damaged, {text[:60]!r}") from error

    def choices(self) -> dict[str, str | None]:
        """Return the option of each config group that the run was made of, or raise ConfigError."""
        return self.parsed_tag("choices", lambda text: dict(json.loads(text)), {})

    def explain_status(self) -> str:
        """Return the run's status, the reason for it, and what a person can do next."""
        text = f"the run is {self.status}"
        if reason := self.tags.get("reason"):
            text += f": {reason}"
        if self.status == "RUNNING":
            text += f". Its record grows in {self.folder}: wait for its end"
            with contextlib.suppress(OSError):
                if (history := RunHistory.of(self.folder)).status:
                    text = (
                        f"the run is {history.status}, which MLflow has not got yet. To bring it "
                        f"there: mnist-exp sync {shlex.quote(str(self.folder))}"
                    )
        elif self.status == "KILLED":
            uri = f"tracking.uri={self.store_uri}"
            words = ["mnist-exp", "resume", self.parent or self.id, uri]
            text += f". To go on with it: {shlex.join(words)}"
        return text
