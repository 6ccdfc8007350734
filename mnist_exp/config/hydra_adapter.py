"""Hydra, as this project uses it: the only file that imports `hydra._internal`."""

import argparse
import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.config import paths
from mnist_exp.config.schema import Schema, StackedLauncher
from mnist_exp.errors import ConfigError, first_line

# ValueError: a group that is given something else than a name; AssertionError: a key that is added
# to nothing
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError
)  # fmt: skip
_LONGEST_NAME = 240  # bytes; with a suffix it is the name of a file
RECIPE_FILES: dict[str, str] = {}  # recipe files by the name that Hydra knows them by


def register() -> None:
    """Make the schema and the resolvers known to Hydra; to be called before Hydra starts."""
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises
    ConfigStore.instance().store("schema", Schema)
    ConfigStore.instance().store("stacked", StackedLauncher, group="hydra/launcher")
    OmegaConf.register_new_resolver("project_root", lambda: str(paths.project_root()), replace=True)
    OmegaConf.register_new_resolver("output_root", lambda: str(paths.output_root()), replace=True)


def hydra_words(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """Return overrides as Hydra takes them, with recipe files and a folder made known to it."""
    for word in overrides:
        check_name(word.partition("=")[0])
    words = [_as_choice(word) for word in overrides]
    if config_dir is None:
        return words
    folder = os.path.realpath(config_dir)
    if not os.path.isdir(folder):
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
    return [*words, f"hydra.searchpath=['file://{paths.project_root()}','file://{folder}']"]


def check_name(name: str) -> None:
    """Raise ConfigError for a key or a config's name that cannot be: Hydra looks for its file."""
    size = len(name.encode(errors="replace"))
    if size > _LONGEST_NAME:
        raise ConfigError(
            f"{name[:60]}...: a name has {_LONGEST_NAME} bytes at most, and this one {size}"
        )


def _as_choice(word: str) -> str:
    """Return experiments=PATH/best.yaml as a choice that Hydra can find, else the word itself."""
    key, _, value = word.partition("=")
    if key.lstrip("+") != "experiments":
        return word
    files = [value] if os.path.exists(_unquoted(value)) else value.split(",")
    return f"{key}={','.join(map(_recipe_name, files))}"


def _unquoted(value: str) -> Path:
    return Path(value.strip("'\"")).expanduser()


def _recipe_name(value: str) -> str:
    """Return the name that a recipe file is made known to Hydra by, anything else as it is."""
    path = _unquoted(value)
    if path.suffix not in (".yaml", ".yml"):
        return value
    fault = f"experiments={path}"
    if path.is_dir():
        raise ConfigError(f"{fault}: it is a folder, not a file")
    if not path.exists():
        raise ConfigError(f"{fault}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
        node = OmegaConf.create(text)
    except OSError as error:
        raise ConfigError(f"{fault}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{fault}: cannot be read, as it is no text (UTF-8)") from error
    except Exception as error:  # whatever the parser of YAML raises
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{fault}{line}: cannot be read as YAML, {reason}") from error
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    # a name that Hydra's grammar allows, whatever the path is called
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = re.sub(r"\W+", "_", path.stem, flags=re.ASCII) + "-" + digest
    RECIPE_FILES[name] = str(path)
    ConfigStore.instance().store(
        group="experiments", name=name, node=node, package=package[1] if package else None
    )
    return name


def compose_raw(
    overrides: Sequence[str],
    config_name: str = "config",
    config_dir: str | None = None,
    mode: RunMode = RunMode.RUN,
) -> tuple[HydraContext, DictConfig]:
    """Compose a config, with Hydra's part in it; return also what Hydra's launchers need.

    Args:
        overrides: What differs from the config.
        config_name: The config file to start from.
        config_dir: One more folder of config groups.
        mode: MULTIRUN composes what the jobs of a sweep have in common.

    Raises:
        COMPOSITION_ERRORS: One of these.
    """
    check_name(config_name)
    words = hydra_words(overrides, config_dir)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(_conf(), job_name="train", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(config_name, words, mode, from_shell=False)
    if mode == RunMode.MULTIRUN:
        str(config.hydra.sweep.dir)  # an interpolation in it may lead nowhere
    else:
        make_paths_absolute(config)
    return HydraContext(hydra.config_loader, Callbacks(config)), config


def make_paths_absolute(config: DictConfig) -> None:
    """Make the paths in a composed config absolute: they begin where the command was typed.

    A record must not depend on that, and a job or a resumed run may be trained elsewhere.
    """
    start = config.hydra.runtime.cwd
    if root := OmegaConf.select(config, "dataset.root", throw_on_missing=False):
        path = os.path.join(start, os.path.expanduser(str(root)))
        config.dataset.root = os.path.realpath(path)
    if folder := str(config.hydra.run.dir).strip():
        with read_write(config), open_dict(config):
            config.hydra.run.dir = os.path.join(start, folder)


def compose_leniently(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> tuple[HydraContext, DictConfig]:
    """Do as `compose_raw` for a sweep, as far as the overrides go: one may be wrong or unfinished.

    Raise one of COMPOSITION_ERRORS where there is no such config.
    """
    for words in (overrides, [word for word in overrides if "." not in word]):
        with contextlib.suppress(*COMPOSITION_ERRORS):  # ConfigError is one of them
            return compose_raw(words, config_name, config_dir, RunMode.MULTIRUN)
    return compose_raw([], config_name, config_dir, RunMode.MULTIRUN)


def _conf() -> str:
    return str(paths.project_root() / "conf")


def run_hydra_raw(words: Sequence[str], job: Callable[[DictConfig], object]) -> None:
    """Run Hydra's own program on the words of a command line.

    It prints what a flag asks for, or calls `job` with the composed config. Raise one of
    COMPOSITION_ERRORS, or what `job` raises.
    """
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, instead of printing them
    argv, sys.argv = sys.argv, ["mnist-exp train", *map(_as_choice, words)]

    def call_job(config: DictConfig) -> None:
        sys.argv = argv  # for the record of the run
        with open_dict(config):
            config.hydra = OmegaConf.create({"hydra": HydraConfig.get()}).hydra
        os.chdir(config.hydra.runtime.cwd)  # as where this project composes
        make_paths_absolute(config)
        job(config)

    hydra_main(version_base="1.3", config_path=_conf(), config_name="config")(call_job)()


def hydra_flags() -> argparse.ArgumentParser:
    """Return the parser of Hydra's own flags."""
    return get_args_parser()


def is_sweep(config: DictConfig) -> bool:
    """Return whether a composed config asks for several jobs, as a recipe may."""
    return bool(config.hydra.mode == RunMode.MULTIRUN)


def import_target(path: str) -> Any:
    """Import what a dotted path leads to. Raise whatever somebody's module raises."""
    return get_object(path)


def instantiate_target(node: Any, **arguments: Any) -> Any:
    """Build the object that a config node names, and those nested in it.

    Raise whatever a constructor raises, as it raised it.
    """
    try:
        return instantiate(node, **arguments, _convert_="all")
    except HydraException as error:
        raise (error.__cause__ or error) from None


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Return every combination of what is swept, as the words that give it to one job."""
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return [list(words) for words in jobs]


def typed_overrides(config: DictConfig) -> list[str]:
    """Return the overrides of a composed config as they were typed, without Hydra's own.

    Interpolations stay as they are: in a sweep, each job has another value for them.
    """
    words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(words, list)
    return [str(word) for word in words]


def set_overrides(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Write a job's overrides into Hydra's part of its config, as Hydra does when it composes."""
    task_overrides = [override for override in overrides if not override.is_hydra_override()]
    job = config.hydra.job
    config.hydra.overrides.task = [override.input_line for override in task_overrides]
    job.override_dirname = get_overrides_dirname(task_overrides, **job.config.override_dirname)
