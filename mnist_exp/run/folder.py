"""The output folder of a run: is it free, and the configs in it, from which a run is resumed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from mnist_exp.errors import ConfigError
from mnist_exp.run.job import Job
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.run_log import OpenRuns


def check_output_folder(folder: Path, key: str = "hydra.run.dir") -> None:
    """Raise ConfigError if the folder that `key`, if any, names cannot be made or written."""
    try:
        files.check_writable_folder(folder)
    except OSError as error:
        raise _not_writable(folder, error, key) from error


@contextlib.contextmanager
def new_output_folder(folder: Path, key: str) -> Iterator[None]:
    """Make the folder that `key` names, for the block to fill.

    Where that raises OSError, raise ConfigError, with no new folder left.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise _not_writable(folder, error, key) from error


def _not_writable(folder: Path, error: OSError, key: str) -> ConfigError:
    todo = f"Choose another: {key}=FOLDER" if key else "Make it writable, and go on"
    return ConfigError(
        f"{folder}: the output folder cannot be made or written ({error.strerror}). {todo}"
    )


def check_registry(open_runs: OpenRuns) -> None:
    """Raise ConfigError if the registry of the runs that are open cannot be written."""
    try:
        files.check_writable_folder(open_runs.folder)
    except OSError as error:
        raise ConfigError(
            f"{open_runs.folder}: the registry of open runs cannot be written ({error.strerror}), "
            f"and no run is begun without it. Make it writable; or install the package with pip, "
            f"and start it in a folder that is, where outputs/ will be then"
        ) from error


def check_vacant(folder: Path) -> None:
    """Raise ConfigError if a folder holds the record of a run already."""
    if journal.size(folder) > 0:
        raise ConfigError(
            f"{folder}: it holds the record of a run already, which is not overwritten. Choose "
            f"another folder, or go on with that run: mnist-exp resume {folder}"
        )


def write_configs(job: Job, folder: Path) -> None:
    """Write the configs of a job into its folder. Raise ConfigError, with no new folder left."""
    with new_output_folder(folder, "hydra.run.dir"):
        (folder / ".hydra").mkdir(exist_ok=True)
        # `load_composed` reads these two
        files.write(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(job.task_config))
        hydra = OmegaConf.masked_copy(job.composed, "hydra")
        files.write(folder / ".hydra" / "hydra.yaml", OmegaConf.to_yaml(hydra))
        OmegaConf.save(job.composed.hydra.overrides.task, folder / ".hydra" / "overrides.yaml")
        OmegaConf.save(job.task_config, folder / "config.yaml", resolve=True)


def load_composed(folder: Path) -> DictConfig:
    """Return the composed config of a run as it was when it began. Raise ConfigError if damaged."""
    try:
        config = OmegaConf.load(folder / ".hydra" / "config.yaml")
        hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml")
        assert isinstance(config, DictConfig) and isinstance(hydra, DictConfig)
        with open_dict(config):
            config.hydra = hydra.hydra
    except Exception as error:  # whatever a file can hold
        raise ConfigError(
            f"{folder / '.hydra'}: the run's config cannot be read ({error})"
        ) from error
    return config
