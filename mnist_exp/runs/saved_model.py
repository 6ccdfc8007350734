"""The saved model of a run, alone or with the data set that it was trained on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mnist_exp.config.schema import Config
from mnist_exp.config.validate import validate
from mnist_exp.data.dataset import Dataset, DatasetInfo
from mnist_exp.errors import ConfigError
from mnist_exp.runs.build import build_model
from mnist_exp.runs.job import Load, load_dataset
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.store import Store, StoredRun
from mnist_exp.training.stack import Stack


def state(stack: Stack, facts: DatasetInfo) -> dict[str, Any]:
    """What a checkpoint holds of a model (a stack of one), and of the data it was trained on."""
    plain = {**asdict(facts), "classes": list(facts.classes), "shape": list(facts.shape)}
    return {"model": stack.model(0).state_dict(), "data": plain}


def fetch_model(store: Store, run: StoredRun) -> tuple[DatasetInfo, Stack]:
    """A run's model, as a stack of one on the CPU.

    Raises ConfigError.
    """
    config, kept = _fetched(store, run)
    name = f"run {run.id}"
    if "data" not in kept:
        raise ConfigError(
            f"{name}: its checkpoint does not say which classes it knows, as an earlier version "
            f"has written it. Train it again"
        )
    own = kept["data"]
    facts = DatasetInfo(tuple(own["classes"]), tuple(own["shape"]), own["mean"], own["std"])
    return facts, _stack(validate(config), kept["model"], facts, name)


def fetch(
    store: Store, run: StoredRun, load: Load = load_dataset, root: str | None = None
) -> tuple[Dataset, Stack]:
    """A run's model and its data set. root: where that is by now, if not where it was.

    Raises ConfigError, also where the data is not what the run was trained on.
    """
    config, kept = _fetched(store, run)
    if root is not None:
        config.dataset.root = root
    own, name = validate(config), f"run {run.id}"
    dataset = load(own.dataset)
    digest = run.dataset_digest
    if digest not in ("", dataset.digest):
        raise ConfigError(
            f"{dataset.source}: this is not the data of {name}: its SHA-256 is "
            f"{dataset.digest[:12]}..., and was {digest[:12]}... To name the right folder: "
            f"dataset.root=FOLDER"
        )
    return dataset, _stack(own, kept["model"], dataset.info, name)


def recall(recorded: Path, weights: Path, load: Load) -> tuple[Dataset, Stack]:
    """A run's data set and model from files: its resolved config, and its checkpoint.

    Raises ConfigError.
    """
    config = validate(read_config(recorded))
    dataset = load(config.dataset)
    weights_of = checkpoint.load(weights)["model"]
    return dataset, _stack(config, weights_of, dataset.info, str(weights.parent))


def config_of(store: Store, run_id: str, folder: Path) -> DictConfig:
    """A run's config, as its record has it, checked. folder: where a copy of the file is left.

    Raises ConfigError where the run has none, or one that is damaged.
    """
    path = store.fetch(run_id, "config.yaml", folder)
    return read_config(path, f"run {run_id}, config.yaml in its record")


def check_finite(logits: Tensor, run: StoredRun) -> None:
    """Raises ConfigError where a run's model gives no probabilities, as one that has diverged."""
    if not logits.log_softmax(-1).isnan().any():  # -inf is a class that cannot be
        return
    raise ConfigError(
        f"run {run.id}: with its weights, outputs are infinite or no numbers (nan); "
        f"{run.explain_status()}"
    )


def _fetched(store: Store, run: StoredRun) -> tuple[DictConfig, dict[str, Any]]:
    """A run's config, and what its checkpoint holds."""
    with TemporaryDirectory() as folder:
        try:
            path = store.fetch(run.id, "checkpoint", Path(folder)) / "checkpoint.pt"
        except ConfigError as error:
            raise ConfigError(f"{error}; {run.explain_status()}") from error
        config = config_of(store, run.id, Path(folder))
        return config, checkpoint.load(path, f"run {run.id}, checkpoint/checkpoint.pt")


def read_config(path: Path, name: str = "") -> DictConfig:
    """A run's resolved config, checked. `name`: of the file, as for `checkpoint.load`.

    Raises ConfigError.
    """
    name = name or str(path)
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{name}: it cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever a parser of YAML raises
        said = " ".join(str(error).split())
        raise ConfigError(f"{name}: it cannot be read as YAML, {said}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{name}: it holds no keys with their values")
    try:
        validate(config.copy())  # which it changes
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return config


def _stack(config: Config, weights: Mapping[str, Tensor], facts: DatasetInfo, name: str) -> Stack:
    build = build_model(config, facts.shape, len(facts.classes))
    stack = Stack(build, [config.seed], torch.device("cpu"))
    shapes = [{n: t.shape for n, t in s.items()} for s in (weights, stack.module.state_dict())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{name}: its checkpoint does not fit {config.model['_target_']} as it is now: the "
            f"code has changed since"
        )
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in weights.items()})
    return stack
