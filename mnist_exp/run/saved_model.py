"""The saved model of a run, alone or with the data set that it was trained on."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mnist_exp.config.schema import Config
from mnist_exp.config.validate import validate
from mnist_exp.data.dataset import Dataset, DatasetInfo
from mnist_exp.errors import ConfigError
from mnist_exp.run.build import build_model, precision_of, restore_weights
from mnist_exp.run.job import Load, load_dataset
from mnist_exp.run.stored_config import fetch_config, load_config
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.training.stack import Stack
from mnist_exp.training.views import Views


def model_state(stack: Stack, info: DatasetInfo) -> dict[str, Any]:
    """Return what a checkpoint holds of a model (a stack of one) and of its data set."""
    data = {"classes": list(info.classes), "shape": list(info.shape)}
    data |= {"mean": info.mean, "std": info.std}
    return {"model": stack.model(0).state_dict(), "data": data}


def load_model(store: Store, run: StoredRun) -> tuple[DatasetInfo, Stack]:
    """Return a stored run's model, as a stack of one on the CPU, without its data set.

    Raises:
        ConfigError: The run has left no model, or one that cannot be used.
    """
    config, state = _load_record(store, run)
    name = f"run {run.id}"
    if "data" not in state:
        raise ConfigError(
            f"{name}: its checkpoint does not say which classes it knows, as an earlier version "
            f"has written it. Train it again"
        )
    plain = state["data"]
    info = DatasetInfo(tuple(plain["classes"]), tuple(plain["shape"]), plain["mean"], plain["std"])
    return info, _build_stack(validate(config), state["model"], info, name)


def load_run(
    store: Store, run: StoredRun, load: Load = load_dataset, root: str | None = None
) -> tuple[Dataset, Stack]:
    """Return a stored run's data set and its model, as a stack of one on the CPU.

    Args:
        store: The store that has the run.
        run: The run.
        load: How the data set is loaded.
        root: The folder of the data set, if not the recorded one.

    Raises:
        ConfigError: There is no such model, or the data is not what it was trained on.
    """
    plain, state = _load_record(store, run)
    if root is not None:
        plain.dataset.root = root
    config = validate(plain)
    dataset = load(config.dataset)
    if run.dataset_digest not in ("", dataset.digest):
        raise ConfigError(
            f"{dataset.source}: this is not the data of run {run.id}: its SHA-256 is "
            f"{dataset.digest[:12]}..., and was {run.dataset_digest[:12]}... To name the right "
            f"folder: dataset.root=FOLDER"
        )
    return dataset, _build_stack(config, state["model"], dataset, f"run {run.id}")


def load_from_folder(folder: Path, load: Load) -> tuple[Config, Dataset, Stack]:
    """Return the config, the data set and the model of the run in a folder, or raise ConfigError.

    The model is a stack of one on the CPU.
    """
    config = validate(load_config(folder / "config.yaml"))
    dataset = load(config.dataset)
    weights = checkpoint.load(folder / "checkpoint.pt")["model"]
    return config, dataset, _build_stack(config, weights, dataset, str(folder))


def views_of(run: StoredRun) -> Views:
    """Return the views over which test-time augmentation averages a run's predictions."""
    return Views(mirrored=float(run.params.get("augmentation.flip", 0.0)) > 0)


def check_finite(logits: Tensor, run: StoredRun) -> None:
    """Raise ConfigError if a run's model gives no probabilities, as one that has diverged."""
    if logits.log_softmax(-1).isnan().any():  # -inf is a class that cannot be
        raise ConfigError(
            f"run {run.id}: with its weights, outputs are infinite or no numbers (nan); "
            f"{run.explain_status()}"
        )


def _load_record(store: Store, run: StoredRun) -> tuple[DictConfig, dict[str, Any]]:
    """Return a stored run's config, and the state in its checkpoint."""
    with TemporaryDirectory() as folder:
        try:
            path = store.fetch(run.id, "checkpoint", Path(folder)) / "checkpoint.pt"
        except ConfigError as error:
            raise ConfigError(f"{error}; {run.explain_status()}") from error
        config = fetch_config(store, run.id, Path(folder))
        return config, checkpoint.load(path, f"run {run.id}, checkpoint/checkpoint.pt")


def _build_stack(
    config: Config, weights: Mapping[str, Tensor], info: DatasetInfo, name: str
) -> Stack:
    """Return a model with its weights as a stack of one. `name`: of its run, for the message."""
    build = build_model(config, info.shape, len(info.classes))
    stack = Stack(build, [config.seed], torch.device("cpu"), precision_of(config))
    state = stack.module.state_dict()
    for key, value in weights.items():
        if not isinstance(value, Tensor):  # as an earlier version has let it be trained
            raise ConfigError(f"{name}: its checkpoint holds {key}, which is no tensor")
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in state.items()}:
        raise ConfigError(
            f"{name}: its checkpoint does not fit {config.model['_target_']} as it is now: the "
            f"code has changed since"
        )
    restore_weights(stack, weights)
    return stack
