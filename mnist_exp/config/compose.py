"""From the command line's words to a composed config."""

from collections.abc import Callable, Sequence

from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from mnist_exp.config.explain import explain
from mnist_exp.config.hydra_adapter import COMPOSITION_ERRORS, compose_raw, run_hydra_raw
from mnist_exp.errors import ConfigError, check_list


def compose(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> DictConfig:
    """Return the composed config, with Hydra's own part in it. Nothing is checked but types.

    Args:
        overrides: What differs from the config.
        config_name: The config file to start from.
        config_dir: One more folder of config groups.

    Raises:
        ConfigError: An override is at fault; the message has the nearest that exists.
    """
    return _compose(overrides, config_name, config_dir, RunMode.RUN)[1]


def compose_sweep(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> tuple[HydraContext, DictConfig]:
    """Return what Hydra's launchers need, and the config that the jobs of a sweep share.

    The arguments and errors are those of `compose`.
    """
    return _compose(overrides, config_name, config_dir, RunMode.MULTIRUN)


def _compose(
    overrides: Sequence[str], config_name: str, config_dir: str | None, mode: RunMode
) -> tuple[HydraContext, DictConfig]:
    check_list("overrides", overrides)
    try:
        return compose_raw(overrides, config_name, config_dir, mode)
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from error


def run_hydra(words: Sequence[str], job: Callable[[DictConfig], object]) -> None:
    """Run Hydra's own program, for its flags that print something or lead elsewhere.

    Args:
        words: The words of the command line.
        job: Called with the composed config, unless a flag asks for something else.

    Raises:
        ConfigError: An override is at fault.
    """
    try:
        run_hydra_raw(words, job)
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise explain(error, [word for word in words if not word.startswith("-")]) from error
