"""What a run needs, from its composed config: checked by building it; nothing is created."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from mnist_exp.config import paths
from mnist_exp.config.schema import Config, DatasetConfig, identity, task_config
from mnist_exp.config.validate import validate
from mnist_exp.data import dataset as data
from mnist_exp.errors import ConfigError
from mnist_exp.runs.build import build_model, build_optimizer, build_schedule
from mnist_exp.tracking.journal import OpenRuns
from mnist_exp.tracking.run_log import RunHistory, open_runs_at
from mnist_exp.tracking.store import store_uri
from mnist_exp.training.events import RunSpec
from mnist_exp.training.schedules import Schedule

Load = Callable[[DatasetConfig], data.Dataset]
# the keys and groups that a run's name tells of
NAMED = ("dataset", "dataset.name", "model", "model.hidden", "optimizer", "optimizer.lr",
         "schedule", "training.batch_size", "seed")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing has been created."""

    config: Config
    composed: DictConfig  # Hydra's own part included
    asked: DictConfig  # without it
    name: str
    store_uri: str
    open_runs: OpenRuns  # of the runs that MLflow does not have whole
    device: torch.device
    load: Load
    build: Callable[[], torch.nn.Module]  # the model, initialised from torch's default generator
    optimizer: type[torch.optim.Optimizer]
    optimizer_arguments: dict[str, Any]
    schedule: Schedule

    @property
    def choices(self) -> dict[str, str | None]:
        """Which option was chosen in each config group."""
        return {str(k): v for k, v in self.composed.hydra.runtime.choices.items()}

    @property
    def overrides(self) -> list[str]:
        """What was typed."""
        return list(self.composed.hydra.overrides.task)

    @property
    def run(self) -> RunSpec:
        """What the core needs to know of it."""
        own = self.config.training
        return RunSpec(
            self.config.seed,
            self.optimizer_arguments,
            self.schedule,
            own.label_smoothing,
            own.patience,
        )


def prepare(composed: DictConfig, load: Load | None = None) -> Job:
    """Checks everything that a composed config asks for, by building it; its store is not looked
    at. Raises ConfigError.

    `load`: where the data set comes from, if not from `load_dataset`.
    """
    asked = task_config(composed)
    typed = validate(asked)
    if not str(composed.hydra.run.dir).strip():
        raise ConfigError("hydra.run.dir=: must be a folder of its own for the run's output")
    device = _device(typed.training.device)
    schedule = build_schedule(typed)
    dummy = torch.nn.Parameter(torch.zeros(2, 2))
    build_optimizer(typed, [dummy])  # before the data, which may have to be fetched
    load = load or load_dataset
    dataset = load(typed.dataset)
    if typed.training.patience is not None and dataset.val is None:
        raise ConfigError(
            f"training.patience={typed.training.patience}: needs validation images, and "
            f"dataset.val_size is 0. Add dataset.val_size=5000, or training.patience=null"
        )
    build = build_model(typed, dataset.shape, len(dataset.classes))
    _check_last_batch(build, dataset, typed.training.batch_size)
    with torch.random.fork_rng(devices=[]):
        parameters = [p for p in build().parameters() if p.requires_grad]
    optimizer, arguments = build_optimizer(typed, parameters)
    return Job(
        config=typed,
        composed=composed,
        asked=asked,
        name=typed.tracking.run_name or _name(typed, composed.hydra.runtime.choices),
        store_uri=store_uri(typed.tracking.uri, paths.output_root()),
        open_runs=open_runs_at(paths.output_root()),
        device=device,
        load=load,
        build=build,
        optimizer=optimizer,
        optimizer_arguments=arguments,
        schedule=schedule,
    )


def check_unchanged(job: Job, story: RunHistory) -> None:
    """Raises ConfigError if a run that is to be resumed began with another config."""
    before = story.tags.get("config_hash")
    if before not in (None, identity(job.asked)):
        raise ConfigError(
            "the run began with another config than this. Restore it, or train a new run"
        )


def _check_last_batch(
    build: Callable[[], torch.nn.Module], dataset: data.Dataset, batch_size: int
) -> None:
    """Raises ConfigError if the model cannot train on the epoch's last batch, of one image.

    Batch normalisation of single values cannot; better known now than after an epoch.
    """
    if len(dataset.train) % batch_size != 1 and batch_size != 1:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            build()(torch.zeros(1, *dataset.shape))
    except Exception as error:  # a model can raise anything
        raise ConfigError(
            f"training.batch_size={batch_size}: leaves one image for the last batch of "
            f"{len(dataset.train)} images, on which this model cannot train ({error}). Choose "
            f"another batch size"
        ) from error


def load_dataset(asked: DatasetConfig) -> data.Dataset:
    """The data set that a config asks for, on the CPU."""
    return data.load(
        asked.name,
        root=asked.root,
        val_size=asked.val_size,
        train_size=asked.train_size,
        split_seed=asked.split_seed,
        classes=asked.classes,
        cache=paths.output_root() / "data",
    )


def remembering(size: int = 2) -> Load:
    """`load_dataset`, which has the newest `size` data sets at hand."""

    @functools.lru_cache(size)
    def load(asked: str) -> data.Dataset:
        return load_dataset(DatasetConfig(**json.loads(asked)))

    return lambda asked: load(json.dumps(asdict(asked)))


def _device(asked: str) -> torch.device:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if asked == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if present[name]))
    device = torch.device(asked)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not present[device.type] or (device.index or 0) >= count:
        here = ", ".join(name for name, there in present.items() if there)
        raise ConfigError(f"training.device={asked}: it is not there. This machine has: {here}")
    return device


def _name(config: Config, choices: Mapping[Any, Any]) -> str:
    """What tells a run apart from others in a list: "mlp-64-32 sgd lr=0.1 bs=64 seed=0"."""
    hidden = config.model.get("hidden", [])
    layers = hidden if isinstance(hidden, list) else [hidden]
    model = "-".join([str(choices.get("model") or "model"), *map(str, layers)])
    parts = [model, str(choices.get("optimizer") or "optimizer")]
    if config.dataset.name != "mnist":
        parts.insert(0, config.dataset.name)
    if choices.get("schedule") not in (None, "constant"):
        parts.append(str(choices["schedule"]))
    lr = config.optimizer.get("lr")
    parts += [f"lr={lr:g}"] if isinstance(lr, int | float) else []
    return " ".join([*parts, f"bs={config.training.batch_size}", f"seed={config.seed}"])
