"""The saved model of a run, alone or with the data set that it was trained on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mnist_exp import checkpoint
from mnist_exp import config as configs
from mnist_exp.config import Config
from mnist_exp.data import Dataset, Facts
from mnist_exp.errors import ConfigError
from mnist_exp.job import Load, load_dataset
from mnist_exp.stack import Stack
from mnist_exp.tracking import Store, dataset_digest


def state(stack: Stack, facts: Facts) -> dict[str, Any]:
    """What a checkpoint holds of a model (a stack of one), and of the data it was trained on."""
    plain = {**asdict(facts), "classes": list(facts.classes), "shape": list(facts.shape)}
    return {"model": stack.model(0).state_dict(), "data": plain}


def fetch_model(store: Store, found: Any) -> tuple[Facts, Stack]:
    """A run's model, as a stack of one on the CPU. found: as `store.find` gives it.

    Raises ConfigError.
    """
    with _fetched(store, found) as (recorded, weights):
        config, kept = _config(recorded), checkpoint.load(weights)
        if "data" not in kept:
            raise ConfigError(
                f"run {found.info.run_id}: its checkpoint does not say which classes it knows, as "
                f"an earlier version has written it. Train it again"
            )
        own = kept["data"]
        facts = Facts(tuple(own["classes"]), tuple(own["shape"]), own["mean"], own["std"])
        return facts, _stack(config, kept["model"], facts, weights)


def fetch(
    store: Store, found: Any, load: Load = load_dataset, root: str | None = None
) -> tuple[Dataset, Stack]:
    """A run's model and its data set. root: where that is by now, if not where it was.

    Raises ConfigError, also where the data is not what the run was trained on.
    """
    with _fetched(store, found) as (recorded, weights):
        dataset, stack = recall(recorded, weights, load, root)
    digest = dataset_digest(found)
    if digest not in ("", dataset.digest):
        raise ConfigError(
            f"{dataset.source}: this is not the data of run {found.info.run_id}: its SHA-256 is "
            f"{dataset.digest[:12]}..., and was {digest[:12]}... To name the right folder: "
            f"dataset.root=FOLDER"
        )
    return dataset, stack


def recall(
    recorded: Path, weights: Path, load: Load, root: str | None = None
) -> tuple[Dataset, Stack]:
    """The same from files: a run's resolved config, and its checkpoint. Raises ConfigError."""
    config = _config(recorded, root)
    dataset = load(config.dataset)
    return dataset, _stack(config, checkpoint.load(weights)["model"], dataset.facts, weights)


@contextmanager
def _fetched(store: Store, found: Any) -> Iterator[tuple[Path, Path]]:
    """Copies of a run's config and checkpoint, for as long as they are needed."""
    run_id = found.info.run_id
    with TemporaryDirectory() as folder:
        try:
            weights = store.fetch(run_id, "checkpoint", Path(folder)) / "checkpoint.pt"
        except ConfigError as error:
            raise ConfigError(f"{error}; the run is {found.info.status}") from error
        yield store.fetch(run_id, "config.yaml", Path(folder)), weights


def _config(recorded: Path, root: str | None = None) -> Config:
    asked = OmegaConf.load(recorded)
    assert isinstance(asked, DictConfig)
    if root is not None:
        asked.dataset.root = root
    return configs.validate(asked)


def _stack(
    config: Config, weights: Mapping[str, torch.Tensor], facts: Facts, source: Path
) -> Stack:
    build = configs.build_model(config, facts.shape, len(facts.classes))
    stack = Stack(build, [config.seed], torch.device("cpu"))
    shapes = [{n: t.shape for n, t in s.items()} for s in (weights, stack.module.state_dict())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{source}: this checkpoint does not fit {config.model['_target_']} as it is now: the "
            f"code has changed since"
        )
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in weights.items()})
    return stack
