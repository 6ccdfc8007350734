"""Jobs: everything that a run needs, from its composed config, checked by building it."""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.config import paths
from mnist_exp.config.hydra_adapter import typed_overrides
from mnist_exp.config.names import run_name
from mnist_exp.config.schema import Config, DatasetConfig, FocusConfig, identity, task_config
from mnist_exp.config.validate import likely_mistakes, validate
from mnist_exp.data import dataset as datasets
from mnist_exp.data.dataset import Dataset
from mnist_exp.data.sources import format_shape
from mnist_exp.errors import ConfigError
from mnist_exp.run.build import (
    add_to_import_path,
    augmentation_of,
    build_model,
    build_schedule,
    optimizer_class,
    precision_of,
)
from mnist_exp.run.trial import try_run
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.training.epochs import EpochSizes, Focus
from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.precision import slow_precision
from mnist_exp.training.schedules import Schedule

log = logging.getLogger(__name__)
Load = Callable[[DatasetConfig], Dataset]


@dataclass(frozen=True)
class Job:
    """A run that is checked and ready to be trained; nothing has been created for it."""

    config: Config
    composed: DictConfig  # with Hydra's own part
    task_config: DictConfig  # without it, as `validate` has left it
    name: str
    device: torch.device
    load: Load
    build: Callable[[], torch.nn.Module]  # the model, initialised from torch's default generator
    optimizer: type[torch.optim.Optimizer]
    optimizer_arguments: dict[str, Any]
    schedule: Schedule
    has_convolutions: bool = False  # known once the model is built

    @property
    def choices(self) -> dict[str, str | None]:
        """The option that was chosen in each config group."""
        return {str(k): v for k, v in self.composed.hydra.runtime.choices.items()}

    @property
    def overrides(self) -> list[str]:
        """The overrides that were typed."""
        return typed_overrides(self.composed)

    @property
    def precision(self) -> torch.dtype:
        """The type in which the model computes."""
        return precision_of(self.config)

    @property
    def folder(self) -> Path:
        """The output folder of a run that is no job of a sweep."""
        return Path(self.composed.hydra.run.dir)

    @property
    def run_spec(self) -> RunSpec:
        """The numbers of this run that `fit` needs to know."""
        training = self.config.training
        return RunSpec(
            seed=self.config.seed,
            optimizer=self.optimizer_arguments,
            schedule=self.schedule,
            label_smoothing=training.label_smoothing,
            patience=training.patience,
            clip_norm=training.clip_norm,
            ema=training.ema,
        )

    @property
    def stack_spec(self) -> StackSpec:
        """The settings that this run shares with all runs of a stack."""
        training = self.config.training
        return StackSpec(
            optimizer=self.optimizer,
            epochs=training.epochs,
            batch_size=training.batch_size,
            augmentation=augmentation_of(self.config),
            decay_norms=training.decay_norms,
            focus=_focus(training.focus),
        )


def prepare(composed: DictConfig, load: Load | None = None) -> Job:
    """Check all that a composed config asks for by building it, and return it as a job.

    Args:
        composed: The config with Hydra's own part.
        load: Loads a data set; by default a `CachedLoader` of the job's own.

    Raises:
        ConfigError: The run cannot be trained. Its store and its folder are not looked at.
    """
    plain = task_config(composed)
    config = validate(plain)
    if not str(composed.hydra.run.dir).strip():
        raise ConfigError("hydra.run.dir=: must be a folder of its own for the run's output")
    if config.trusted_packages:  # modules beside where the command was typed
        add_to_import_path(composed.hydra.runtime.cwd)
    device = _device(config.training.device)
    schedule = build_schedule(config)
    optimizer, optimizer_arguments = optimizer_class(config)
    load = load or CachedLoader()
    dataset = load(config.dataset)  # after what can be checked without: it may have to be fetched
    if config.training.patience is not None and dataset.val is None:
        raise ConfigError(
            f"training.patience={config.training.patience}: needs validation images, and "
            f"dataset.val_size is 0. Add dataset.val_size=5000, or training.patience=null"
        )
    check_fits(augmentation_of(config), dataset)
    build = build_model(config, dataset.shape, len(dataset.classes))
    job = Job(
        config=config,
        composed=composed,
        task_config=plain,
        name=run_name(config, composed.hydra.runtime.choices),
        device=device,
        load=load,
        build=build,
        optimizer=optimizer,
        optimizer_arguments=optimizer_arguments,
        schedule=schedule,
    )
    _check_epochs(job.stack_spec.epoch_sizes(len(dataset.train)))
    stack = try_run(config, build, dataset, job.run_spec, job.stack_spec)
    return replace(job, has_convolutions=stack.has_convolutions)


def warn(jobs: Sequence[Job]) -> None:
    """Warn of what is seldom meant in jobs that are about to begin, of each such thing once."""
    slow = {slow_precision(job.precision, job.device) for job in jobs} - {""}
    for warning in (*likely_mistakes([job.config for job in jobs]), *slow):
        log.warning(warning)


def check_fits(augmentation: Augmentation, dataset: Dataset) -> None:
    """Raise ConfigError for an augmentation that is too large for the images of a data set."""
    size = min(dataset.shape[1:])
    for key in ("shift", "erase"):
        value = getattr(augmentation, key)
        if value >= size:
            raise ConfigError(
                f"augmentation.{key}={value:g}: must be below {size}, as the images of "
                f"{dataset.name} have {format_shape(dataset.shape[1:])} pixels. "
                f"To leave it out: augmentation.{key}=0"
            )


def _focus(config: FocusConfig) -> Focus | None:
    return None if config.after is None else Focus(config.after, config.hardest, config.random)


def _check_epochs(sizes: EpochSizes) -> None:
    """Raise ConfigError if an epoch would have no image, or no hard one."""
    focus = sizes.focus
    if focus is None:
        return
    whole, one = focus.first_epochs - 1, float(f"{1 / sizes.count:.2g}")  # epochs; an image's share
    if sizes.images(focus.first_epochs) == 0:
        raise ConfigError(
            f"training.focus.after={focus.after:.9g}: its last part of an epoch, "
            f"{focus.after - whole:.2g}, is none of the {sizes.count} training images. Choose "
            f"{f'{whole}, or ' if whole else ''}{whole + one:.9g} or more"
        )
    if sizes.hardest == 0:
        raise ConfigError(
            f"training.focus.hardest={focus.hardest:g}: that is none of the {sizes.count} training "
            f"images. One of them is {one:g}; choose that or more"
        )


def check_unchanged(job: Job, history: RunHistory) -> None:
    """Raise ConfigError if a run that is to be resumed began with another config, or other data."""
    if history.tags.get("config_hash") not in (None, identity(job.task_config)):
        raise ConfigError(
            "the run began with another config than this. Restore it, or train a new run"
        )
    dataset = job.load(job.config.dataset)
    if history.dataset_digest not in ("", dataset.digest):
        raise ConfigError(
            f"the run began with other data than is in {dataset.source} now: its SHA-256 is "
            f"{dataset.digest[:12]}..., and was {history.dataset_digest[:12]}... Restore it, or "
            f"train a new run"
        )


def load_dataset(config: DatasetConfig) -> Dataset:
    """Return the data set that a config asks for, on the CPU."""
    return datasets.load(**asdict(config), cache=paths.output_root() / "data")


def _load_from_json(config: str) -> Dataset:
    return load_dataset(DatasetConfig(**json.loads(config)))


class CachedLoader:
    """A `load_dataset` that keeps the two data sets which were used last."""

    def __init__(self) -> None:
        self._load = functools.lru_cache(2)(_load_from_json)

    def __call__(self, config: DatasetConfig) -> Dataset:
        """Return the data set that a config asks for."""
        return self._load(json.dumps(asdict(config)))

    def forget(self) -> None:
        """Let the next data set be read from its files, which may have changed."""
        self._load.cache_clear()


def _device(name: str) -> torch.device:
    """Return the device of this name, or the best one for "auto". Raise ConfigError without it."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not present[device.type] or (device.index or 0) >= count:
        available = ", ".join(kind for kind, is_present in present.items() if is_present)
        raise ConfigError(f"training.device={name}: it is not there. This machine has: {available}")
    return device
