"""The identity of a config: all that a run's numbers depend on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mnist_exp.config import schema
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import task_config
from mnist_exp.config.validate import validate


@pytest.fixture(scope="module")
def base() -> DictConfig:
    return task_config(compose(["optimizer=momentum", "schedule=cosine"]))


def identity(base: DictConfig, key: str, value: Any) -> str:
    """Of `base` with one more value."""
    changed = base.copy()
    OmegaConf.update(changed, key, value, force_add=True)
    assert changed != base
    return schema.identity(changed)


@pytest.mark.parametrize(
    "key, value",
    [
        *[("tracking.uri", "sqlite:///x.db"), ("tracking.experiment", "other")],
        *[("tracking.run_name", "a"), ("tracking.tags", {"a": "b"}), ("tracking.image_every", 3)],
    ],
)
def test_identity_ignores(key: str, value: Any, base: DictConfig) -> None:
    assert identity(base, key, value) == schema.identity(base)


@pytest.mark.parametrize(
    "key, value",
    [
        *[("seed", 1), ("dataset.name", "kmnist"), ("dataset.val_size", 0), ("training.epochs", 9)],
        *[("optimizer.lr", 0.021), ("optimizer._target_", "torch.optim.Adam")],
        *[("model.hidden", [64, 33]), ("schedule.final", 0.5), ("optimizer.nesterov", False)],
    ],
)
def test_identity_depends_on(key: str, value: Any, base: DictConfig) -> None:
    assert identity(base, key, value) != schema.identity(base)


LATER = {key: v for key, v in schema.defaults_of_old() if not key.startswith("tracking.")}
OTHER = {bool: False, float: 0.25, int: 3, str: "bfloat16", type(None): 1}  # by type of the default


@pytest.mark.parametrize("key", LATER)
def test_identity_is_as_before_there_was_a_key(key: str, base: DictConfig) -> None:
    old = OmegaConf.create(OmegaConf.to_container(base))
    part, _, name = key.rpartition(".")
    del OmegaConf.select(old, part)[name]
    assert isinstance(old, DictConfig) and key not in dict(schema.leaves(old))
    assert OmegaConf.select(base, key) == LATER[key]
    assert schema.identity(old) == schema.identity(base)
    assert identity(base, key, OTHER[type(LATER[key])]) != schema.identity(base)
    assert dict(schema.leaves(asdict(validate(old))))[key] == LATER[key]


def test_identity_is_that_of_the_record(tmp_path: Path) -> None:
    config = task_config(compose(["debug=overfit", "optimizer=adamw"]))
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(loaded, DictConfig)
    validate(loaded)
    assert schema.identity(loaded) == schema.identity(config)
