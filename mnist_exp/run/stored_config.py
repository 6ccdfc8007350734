"""The config of a run, from its record."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mnist_exp.config.validate import validate
from mnist_exp.errors import ConfigError
from mnist_exp.tracking.store import Store


def fetch_config(store: Store, run_id: str, folder: Path) -> DictConfig:
    """Return a stored run's config, checked. Raise ConfigError if it has none, or a damaged one.

    `folder`: where a copy of the file is left.
    """
    path = store.fetch(run_id, "config.yaml", folder)
    return load_config(path, f"run {run_id}, config.yaml in its record")


def load_config(path: Path, name: str = "") -> DictConfig:
    """Return a run's config from its file, checked. Raise ConfigError if it is damaged.

    `name`: what the messages call the file, if not by its path.
    """
    name = name or str(path)
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{name}: it cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever a parser of YAML raises
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: it cannot be read as YAML, {reason}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{name}: it holds no keys with their values")
    try:
        validate(config.copy())  # which it changes
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return config
