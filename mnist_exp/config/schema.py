"""The types of a config, and a config as plain values."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class DatasetConfig:
    """The choice of a data set, and its split."""

    name: str = MISSING
    root: str | None = MISSING
    val_size: int | None = MISSING
    train_size: int | None = MISSING
    split_seed: int = MISSING
    classes: list[str] | None = MISSING


@dataclass
class TrainingConfig:
    """The training of a run, beside its model, optimizer and schedule."""

    epochs: int = MISSING
    batch_size: int = MISSING
    device: str = MISSING
    threads: int | None = MISSING
    label_smoothing: float = MISSING
    patience: int | None = MISSING
    checkpoint_every: str = MISSING
    compile: str = MISSING


@dataclass
class TrackingConfig:
    """The record of a run in MLflow."""

    uri: str | None = MISSING
    experiment: str = MISSING
    run_name: str | None = MISSING
    tags: dict[str, str] = MISSING
    image_every: int | None = MISSING
    flush_seconds: float = MISSING
    required: bool = MISSING


@dataclass
class Config:
    """The config of a run."""

    seed: int = MISSING
    trusted_packages: list[str] = MISSING
    dataset: DatasetConfig = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    training: TrainingConfig = MISSING
    tracking: TrackingConfig = MISSING


@dataclass
class SweepConfig:
    """The part of a config that concerns its sweep, and no run."""

    on_error: str = MISSING
    skip_invalid: bool = MISSING
    test: str = MISSING
    max_jobs: int = MISSING

    @classmethod
    def from_record(cls, settings: Mapping[str, Any]) -> "SweepConfig":
        """Return the settings that a sweep was started with.

        Keys that are known no more are left out: `yes` was in the place of `max_jobs`, which
        matters before a sweep begins and never after.
        """
        return cls(**{key: settings[key] for key in cls.__annotations__ if key in settings})


@dataclass
class Schema(Config):
    """All that can be typed: the config of a run, and the settings of its sweep."""

    sweep: SweepConfig = MISSING


@dataclass
class StackedLauncher:
    """The options of `hydra/launcher=stacked`, which this project runs itself."""

    max_stack: int | None = None  # models trained together; None: what is fastest on the device


ONE_OF = {  # what a key can be, where that is one of a few names
    "training.device": ("auto", "cpu", "cuda", "mps"),
    "training.compile": ("auto", "always", "never"),
    "sweep.on_error": ("continue", "stop"),
    "sweep.test": ("chosen", "all"),
}
OPEN_PARTS = ("model", "optimizer", "schedule")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config as dotted names and plain values: ("optimizer.lr", 0.1). Lists are values."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def task_config(config: DictConfig) -> DictConfig:
    """Return the config of the run itself, without Hydra's own part, and the sweep's."""
    keys = [str(key) for key in config if key not in ("hydra", "sweep")]
    return OmegaConf.masked_copy(config, keys)


def identity(config: DictConfig) -> str:
    """Return the SHA-256 of all that a run's numbers depend on: the config less `tracking`."""
    values = {name: value for name, value in leaves(config) if not name.startswith("tracking.")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
