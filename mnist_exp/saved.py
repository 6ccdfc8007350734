"""The saved model of a run, with the data set that it was trained on."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mnist_exp import checkpoint, data
from mnist_exp import config as configs
from mnist_exp.errors import ConfigError
from mnist_exp.job import Load, load_dataset
from mnist_exp.stack import Stack
from mnist_exp.tracking import Store


def fetch(store: Store, found: Any, load: Load = load_dataset) -> tuple[data.Dataset, Stack]:
    """From the store alone, of a run as `store.find` gives it. Raises ConfigError."""
    run_id = found.info.run_id
    with TemporaryDirectory() as folder:
        try:
            path = store.fetch(run_id, "checkpoint", Path(folder)) / "checkpoint.pt"
        except ConfigError as error:
            raise ConfigError(f"{error}; the run is {found.info.status}") from error
        config = store.fetch(run_id, "config.yaml", Path(folder))
        return recall(config, path, load)


def recall(recorded: Path, weights: Path, load: Load) -> tuple[data.Dataset, Stack]:
    """From a run's resolved config and its checkpoint: its data set, and its saved model as a stack
    of one, on the CPU. Raises ConfigError."""
    state = checkpoint.load(weights)["model"]
    asked = OmegaConf.load(recorded)
    assert isinstance(asked, DictConfig)
    config = configs.validate(asked)
    dataset = load(config.dataset)
    stack = Stack(
        configs.build_model(config, dataset.shape, len(dataset.classes)),
        [config.seed],
        torch.device("cpu"),
    )
    shapes = [{n: t.shape for n, t in s.items()} for s in (state, stack.module.state_dict())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{weights}: this checkpoint does not fit {config.model['_target_']} as it is now: the "
            f"code has changed since"
        )
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in state.items()})
    return dataset, stack
