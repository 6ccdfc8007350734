"""From the command line's words to a checked config, and from its open parts to objects.

Closed parts (`seed`, `dataset`, `training`, `tracking`) are the dataclasses below: names and types
are theirs, ranges are in `validate`. Open parts (`model`, `optimizer`, `schedule`) name a
`_target_`, whose own signature is their schema.
"""

import argparse
import contextlib
import difflib
import hashlib
import inspect
import json
import logging
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import HydraContext, RunMode
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mnist_exp.errors import ConfigError

if TYPE_CHECKING:  # torch takes 1.6 s to import: only what builds an object may
    import torch

    from mnist_exp.optim import Schedule

# Values are in conf/, types are here. A field that is None in conf/ is decided at the start.


@dataclass
class DatasetConfig:
    name: str = MISSING
    root: str | None = MISSING
    val_size: int | None = MISSING
    train_size: int | None = MISSING
    split_seed: int = MISSING
    classes: list[str] | None = MISSING


@dataclass
class TrainingConfig:
    epochs: int = MISSING
    batch_size: int = MISSING
    device: str = MISSING
    threads: int | None = MISSING
    label_smoothing: float = MISSING
    patience: int | None = MISSING
    checkpoint_every: str = MISSING
    compile: str = MISSING


@dataclass
class TrackingConfig:
    uri: str | None = MISSING
    experiment: str = MISSING
    run_name: str | None = MISSING
    tags: dict[str, str] = MISSING
    image_every: int | None = MISSING
    flush_seconds: float = MISSING
    required: bool = MISSING


@dataclass
class Config:
    seed: int = MISSING
    trusted_packages: list[str] = MISSING
    dataset: DatasetConfig = MISSING
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    training: TrainingConfig = MISSING
    tracking: TrackingConfig = MISSING


@dataclass
class SweepConfig:
    on_error: str = MISSING
    skip_invalid: bool = MISSING
    test: str = MISSING
    yes: bool = MISSING


@dataclass
class Schema(Config):
    """What can be typed: the config of a run, and what concerns its sweep."""

    sweep: SweepConfig = MISSING


# ValueError: a group that is given something else than a name; AssertionError: a key that is added
# to nothing
COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError
)  # fmt: skip
FLOAT32_MAX = 3.4e38
_EVERY = re.compile(r"[1-9]\d{0,8}( ?steps)?")
ONE_OF = {  # what a key can be, where that is one of a few names
    "training.device": ("auto", "cpu", "cuda", "mps"),
    "training.compile": ("auto", "always", "never"),
    "sweep.on_error": ("continue", "stop"),
    "sweep.test": ("chosen", "all"),
}
OPEN_PARTS = ("model", "optimizer", "schedule")
OWN_PACKAGES = ("mnist_exp", "torch.nn", "torch.optim")
_PACKAGE = Path(__file__).resolve().parent
IS_CHECKOUT = not (_PACKAGE / "conf").exists()
_recipes: dict[str, str] = {}  # recipe files by the name that Hydra knows them by


def project_root() -> Path:
    """The folder that holds conf/ and experiments/: the checkout, or the installed package."""
    return _PACKAGE.parent if IS_CHECKOUT else _PACKAGE


def output_root() -> Path:
    """Where outputs and the default store go: the checkout, or else the current folder."""
    return _PACKAGE.parent if IS_CHECKOUT else Path.cwd()


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; to be called before Hydra starts."""
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises
    ConfigStore.instance().store("schema", Schema)
    OmegaConf.register_new_resolver("project_root", lambda: str(project_root()), replace=True)
    OmegaConf.register_new_resolver("output_root", lambda: str(output_root()), replace=True)


def compose(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> DictConfig:
    """The composed config, Hydra's own part included (`cfg.hydra`). Nothing is checked but types.

    `config_dir`: one more folder of config groups, as Hydra's `--config-dir`.
    Raises ConfigError, with the override at fault and the nearest that exists.
    """
    check_list("overrides", overrides)
    try:
        config = _compose(_words(overrides, config_dir), config_name)
        str(config.hydra.run.dir)  # an interpolation in it may lead nowhere
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from error
    return config


def check_list(name: str, given: object) -> None:
    """Raises ConfigError for what is no list of texts or paths; a text is one of its letters."""
    if isinstance(given, str | Path):
        raise ConfigError(f"{name}: must be a list, as in [{given!r}], and not {given!r} itself")
    if not isinstance(given, Sequence) or not all(isinstance(one, str | Path) for one in given):
        raise ConfigError(f"{name}: must be a list of texts, and is {reprlib.repr(given)}")


def _words(overrides: Sequence[str], config_dir: str | None) -> list[str]:
    """What Hydra is to be told: recipe files and the folder made known to it."""
    words = [_as_choice(word) for word in overrides]
    if config_dir is None:
        return words
    here = Path(config_dir).resolve()
    if not here.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
    return [*words, f"hydra.searchpath=['file://{project_root()}','file://{here}']"]


def _as_choice(word: str) -> str:
    """experiments=PATH/best.yaml, or several of them, as names of choices that Hydra can find."""
    key, _, value = word.partition("=")
    if key.lstrip("+") != "experiments":
        return word
    paths = [value] if os.path.exists(_unquoted(value)) else value.split(",")
    return f"{key}={','.join(map(_recipe_named, paths))}"


def _unquoted(value: str) -> Path:
    return Path(value.strip("'\"")).expanduser()


def _recipe_named(value: str) -> str:
    """A recipe file, as a choice that is made known to Hydra; anything else as it is."""
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
        reason = getattr(error, "problem", None) or _last_line(error)
        raise ConfigError(f"{fault}{line}: cannot be read as YAML, {reason}") from error
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    # a name that Hydra's grammar allows, whatever the path is called
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = re.sub(r"\W+", "_", path.stem, flags=re.ASCII) + "-" + digest
    _recipes[name] = str(path)
    ConfigStore.instance().store(
        group="experiments", name=name, node=node, package=package[1] if package else None
    )
    return name


def _compose(words: Sequence[str], config_name: str = "config") -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(project_root() / "conf"), job_name="train", version_base="1.3"):
        return hydra_compose(config_name, list(words), return_hydra_config=True)


def compose_sweep(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> tuple[HydraContext, DictConfig]:
    """What Hydra's launchers need, and the config that the jobs of a sweep have in common."""
    check_list("overrides", overrides)
    words = _words(overrides, config_dir)
    try:
        return _compose_sweep(words, config_name)
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from error


def _compose_sweep(words: Sequence[str], config_name: str) -> tuple[HydraContext, DictConfig]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(project_root() / "conf"), job_name="train", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(config_name, list(words), run_mode=RunMode.MULTIRUN)
        str(config.hydra.sweep.dir)  # an interpolation in it may lead nowhere
        return HydraContext(hydra.config_loader, Callbacks(config)), config


def hydras_parser() -> argparse.ArgumentParser:
    """Of Hydra's own flags."""
    return get_args_parser()


def completions(
    word: str, others: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> list[str]:
    """What an override that begins with `word` can become, once `others` are there.

    Behind the last dot of a key, not all that follow but the next part of each; of a value, all
    that are known: a group's options, one of a few names, or else the one that the config has.
    Raises one of COMPOSITION_ERRORS.
    """
    typed = word.lstrip("+~")
    sign = word.removesuffix(typed)
    context, config = _composed_as_far_as_possible(others, config_name, config_dir)
    groups = [str(group) for group in config.hydra.runtime.choices]
    keys = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    key, equals, value = typed.partition("=")
    if equals:
        swept = value[: value.rfind(",") + 1]  # all but the last of several
        known = _values(key, keys.get(key))
        if key in groups:
            loader, words = context.config_loader, _words([], config_dir)
            known = loader.get_group_options(key, ObjectType.CONFIG, config_name, words)
        return [f"{sign}{key}={swept}{one}" for one in known if one not in swept.split(",")]
    end = "" if sign == "~" else "="
    found = set()
    for name in [*groups, *keys]:
        if name.startswith(typed):
            part = re.compile("[./]").search(name, len(typed))
            found.add(sign + (name[: part.end()] if part else name + end))
    return sorted(found)


def _composed_as_far_as_possible(
    overrides: Sequence[str], config_name: str, config_dir: str | None
) -> tuple[HydraContext, DictConfig]:
    """One of the overrides may be wrong, or not be finished."""
    for words in (overrides, [o for o in overrides if "." not in o]):
        with contextlib.suppress(*COMPOSITION_ERRORS):  # ConfigError is one of them
            return _compose_sweep(_words(words, config_dir), config_name)
    return _compose_sweep(_words([], config_dir), config_name)


def _values(key: str, value: Any) -> Sequence[str]:
    if key in ONE_OF:
        return ONE_OF[key]
    if isinstance(value, bool):
        return ["true", "false"]
    return [str(value)] if re.fullmatch(r"[\w.+-]+", str(value)) and value is not None else []


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """One of Hydra's or OmegaConf's errors, as the one message that a person needs."""
    message = _explanation(error, overrides)
    if file := re.match(r"In '(\S+)/(\S+)': ", str(error)):
        message = f"{_recipes.get(file[2], f'{file[1]}/{file[2]}.yaml')}: {message}"
    elif isinstance(error, MissingConfigException):
        group = str(error.missing_cfg_file).rpartition("/")[0]
        typed = {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}
        if group not in typed and "experiments" in typed:
            recipe = typed["experiments"]
            message = f"{_recipes.get(recipe, recipe)}: {message}"
    return ConfigError(message)


def _explanation(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error).replace("Integer", "a whole number").replace("Float", "a number")
    # what a file leads to is raised in the place of its cause
    cause = next(
        (e for e in (error.__cause__, error.__context__) if isinstance(e, OmegaConfBaseException)),
        error,
    )
    if isinstance(error, MissingConfigException) and error.options is not None:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        if group.startswith("experiments/"):
            own = group.removeprefix("experiments/")
            return f"in its defaults, {own}: {option} has to be: override /{own}: {option}"
        return (
            f"{group}={option}: there is no such choice. "
            f"{_suggest(option, error.options)}{group} can be: {', '.join(error.options)}"
        )
    said = re.search(r"^ +full_key: (\S+)$", text, re.MULTILINE)
    key = getattr(cause, "full_key", None) or (said[1] if said else "")
    if key.split(".")[0] in ("experiments", "debug") and "not in" in str(cause):
        return "a recipe has to begin with the line: # @package _global_"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(key or found[1], overrides)
    if text.startswith("Config group override must be"):
        groups = [word for word in overrides if "." not in word.split("=")[0]]
        return f"{' '.join(groups)}: a group takes the name of one of its choices, as in model=cnn"
    if found := re.match(r"Ambiguous value for argument '(.+)'", text):
        name, _, values = found[1].partition("=")
        return f"{found[1]}: several values are a sweep: add -m. As a list: '{name}=[{values}]'"
    if isinstance(cause, MissingMandatoryValue) and key:
        return f"{key} has no value: add {key}=VALUE"
    if key and "not in" in str(cause):
        return _unknown_key(key, overrides)
    fault = str(cause).splitlines()[0]
    fault = fault.replace("Integer", "a whole number").replace("Float", "a number")
    if fault.startswith("Cannot merge DictConfig with ListConfig"):
        return f"{key or 'the file'}: holds keys with their values, and is given a list"
    if key.startswith("tracking.tags."):
        return f"{key}: a tag's value is text. A name with dots: '+tracking.tags={{a.b: TEXT}}'"
    if key and fault.startswith("Invalid type assigned"):
        return f"{key}: takes no value itself. {_siblings(key, _known([]))}"
    if key:
        return f"{key}: {fault}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, AssertionError):
        return f"{' '.join(overrides)}: cannot be composed ({text})"
    lines = [line for line in text.splitlines() if line and not line.startswith("See https")]
    return "\n".join(lines)


def _unreadable(error: OverrideParseException) -> str:
    """An override that Hydra's grammar does not allow."""
    word = str(error.override)
    if fault := re.search(".* while evaluating .*", str(error)):  # as choice() without a value
        return f"{word}: {fault[0]}"
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: cannot be read. An override is KEY=VALUE"
    if "" in value.split(","):
        return f"{word}: a value is missing beside a comma"
    quoted = shlex.quote(f'{key}="{value}"' if '"' not in value else f"{key}='{value}'")
    return (
        f"{word}: cannot be read. Brackets have to be closed, and a text with signs of its own "
        f"needs quotes: {quoted}"
    )


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    if key.startswith("hydra."):
        siblings = _siblings(key.rpartition(".")[0], _known(overrides, key, hydra=True))
        return f"{key}: Hydra has no such key" + (f". {siblings}" if siblings else "")
    known = _known(overrides, key)
    groups = [str(g) for g in _compose([]).hydra.runtime.choices if "/" not in str(g)]
    parent, _, name = key.rpartition(".")
    if parent == "tracking.tags":
        return f"{key}: there is no such tag yet. To add it: +{key}=VALUE"
    message = f"{key}: there is no such key. {_suggest(key, known + groups)}"
    if siblings := _siblings(parent, known):
        message += siblings
        if parent.split(".")[0] in OPEN_PARTS:
            message += f". To pass {name} to the target all the same: +{key}=VALUE"
        return message
    top = {*groups, *(name.split(".")[0] for name in known)}
    return f"{message}The keys and groups are: {', '.join(sorted(top))}"


def _known(overrides: Sequence[str], but: str = "", hydra: bool = False) -> list[str]:
    """The keys that can be set once the overrides are, without what begins with `but`."""
    others = [o for o in overrides if not but or not o.lstrip("+~").startswith(but)]
    choices = [o for o in others if "." not in o and "," not in o]
    for words in (others, choices, []):  # another override may be wrong as well, or swept
        with contextlib.suppress(*COMPOSITION_ERRORS):
            config = _compose(_words(words, None))
            break
    if hydra:
        return [f"hydra.launcher.{key}" for key in config.hydra.launcher if key != "_target_"]
    kept = [str(key) for key in config if key != "hydra"]
    return [name for name, _ in leaves(OmegaConf.masked_copy(config, kept))]


def _siblings(parent: str, known: Sequence[str]) -> str:
    """As in "optimizer has: lr, momentum"; '' where that is nothing."""
    inside = [k.removeprefix(parent + ".") for k in known if parent and k.startswith(parent + ".")]
    names = dict.fromkeys(name.split(".")[0] for name in inside)
    return f"{parent} has: {', '.join(names)}" if names else ""


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]}? " if near else ""


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The config as dotted names and plain values: ("optimizer.lr", 0.1). Lists are values."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def task_config(config: DictConfig) -> DictConfig:
    """The config of the run itself: without Hydra's own part, and the sweep's."""
    keys = [str(key) for key in config if key not in ("hydra", "sweep")]
    return OmegaConf.masked_copy(config, keys)


def validate_sweep(config: DictConfig) -> SweepConfig:
    """The sweep's part of a composed config. Raises ConfigError."""
    try:
        typed = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(SweepConfig), config.sweep)
        )
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(typed, SweepConfig)
    _need_one_of("sweep.on_error", typed.on_error)
    _need_one_of("sweep.test", typed.test)
    return typed


def identity(config: DictConfig) -> str:
    """SHA-256 (hex) of all that a run's numbers depend on: the config less `tracking`."""
    asked = {name: value for name, value in leaves(config) if not name.startswith("tracking.")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def validate(config: DictConfig) -> Config:
    """The typed config. Raises ConfigError naming the first key that is out of range.

    Needs no torch: what a target takes, and a device's presence, are checked when it is built.
    """
    try:
        if missing := OmegaConf.missing_keys(config):
            key = sorted(missing)[0]
            raise ConfigError(f"{key} has no value yet: add {key}=VALUE")
        OmegaConf.resolve(config)
        # as plain values, because a typed node keeps the keys that +KEY=VALUE has added to it
        plain = OmegaConf.to_container(config)
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(typed, Config)
    if typed.dataset.root is not None:  # a record must not depend on where the command was typed
        root = str(Path(typed.dataset.root).expanduser().resolve())
        typed.dataset.root = config.dataset.root = root
    data, training, tracking = typed.dataset, typed.training, typed.tracking
    need = _need
    need(0 <= typed.seed < 2**63, "seed", typed.seed, "0 or more, below 2**63")
    need(data.val_size is None or data.val_size >= 0, "dataset.val_size", data.val_size,
         "0 or more, or null for a tenth")  # fmt: skip
    need(data.train_size is None or data.train_size >= 1, "dataset.train_size", data.train_size,
         "1 or more, or null for all")  # fmt: skip
    need(0 <= data.split_seed < 2**63, "dataset.split_seed", data.split_seed,
         "0 or more, below 2**63")  # fmt: skip
    need(training.epochs >= 1, "training.epochs", training.epochs, "1 or more")
    need(1 <= training.batch_size < 2**31, "training.batch_size", training.batch_size,
         "1 or more, below 2**31")  # fmt: skip
    is_device = training.device in ONE_OF["training.device"]
    need(is_device or bool(re.fullmatch(r"cuda:\d{1,3}", training.device)), "training.device",
         training.device, "auto, cpu, cuda, cuda:N or mps")  # fmt: skip
    need(training.threads is None or 1 <= training.threads <= 1024, "training.threads",
         training.threads, "from 1 to 1024, or null")  # fmt: skip
    need(0 <= training.label_smoothing < 1, "training.label_smoothing", training.label_smoothing,
         "from 0 to below 1")  # fmt: skip
    need(training.patience is None or training.patience >= 1, "training.patience",
         training.patience, "1 or more, or null")  # fmt: skip
    need(_EVERY.fullmatch(training.checkpoint_every) is not None, "training.checkpoint_every",
         training.checkpoint_every, "a number of epochs, or as in 500steps")  # fmt: skip
    _need_one_of("training.compile", training.compile)
    need(tracking.image_every is None or tracking.image_every >= 1, "tracking.image_every",
         tracking.image_every, "1 or more, or null")  # fmt: skip
    need(0 <= tracking.flush_seconds <= 3600, "tracking.flush_seconds", tracking.flush_seconds,
         "from 0 to 3600")  # fmt: skip
    need(bool(tracking.experiment.strip()), "tracking.experiment", tracking.experiment, "a name")
    for part in OPEN_PARTS:
        for name, value in leaves(getattr(typed, part), f"{part}."):
            too_large = isinstance(value, float) and not abs(value) < FLOAT32_MAX
            need(not too_large, name, value, "a finite float32")
            if name.endswith("_target_"):
                _check_target(name, value, typed.trusted_packages)
    lr = typed.optimizer.get("lr", 0.0)
    is_number = isinstance(lr, int | float) and not isinstance(lr, bool)
    need(is_number and lr >= 0, "optimizer.lr", lr, "a number of 0 or more")
    return typed


@dataclass(frozen=True)
class Every:
    """How often something is due: after so many epochs, or so many steps; the other is 0."""

    epochs: int
    steps: int


def checkpoint_every(text: str) -> Every:
    """`training.checkpoint_every`, once it is validated: "1" is epochs, "500steps" is steps."""
    number = int(re.sub(r"\D", "", text))
    return Every(0, number) if text.endswith("steps") else Every(number, 0)


def _need(ok: bool, key: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def _need_one_of(key: str, value: str) -> None:
    *names, last = ONE_OF[key]
    _need(value in ONE_OF[key], key, value, f"{', '.join(names)} or {last}")


def _check_target(key: str, target: Any, trusted: Sequence[str], home: str = "") -> None:
    """`home`: where the thing that `target` leads to is defined, once that is known."""
    allowed = (*OWN_PACKAGES, *trusted)
    if not any(str(home or target).startswith(f"{p}.") for p in allowed):
        leads = f" leads to {home}" if home else ""
        raise ConfigError(
            f"{key}={target}{leads}: this target is not allowed. "
            f"Targets come from {', '.join(allowed)}; "
            f"to trust another package: trusted_packages=[PACKAGE]"
        )


def _resolve(key: str, node: Mapping[str, Any], base: type, trusted: Sequence[str]) -> Any:
    """The class that `node` names, its arguments checked against its signature.

    An import path may lead through a module into its imports (`torch.nn.modules.os`), so what it
    leads to is checked as well: a subclass of `base`, defined in a package that is allowed.
    """
    target = node.get("_target_")
    _check_target(f"{key}._target_", target, trusted)
    if any(str(target).startswith(f"{p}.") for p in trusted) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside where the command is typed
    try:
        found = get_object(str(target))
    except Exception as error:  # importing somebody's module can raise anything
        reason = " ".join(str(error).split("\n", 1)[-1].split())  # the first line says no more
        raise ConfigError(f"{key}._target_={target}: it cannot be imported. {reason}") from error
    is_class = inspect.isclass(found) and issubclass(found, base)
    home = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', '?')}"
    _check_target(f"{key}._target_", target, trusted, home)
    if not is_class or inspect.isabstract(found):
        raise ConfigError(f"{key}._target_={target}: must be a class that extends {base.__name__}")
    return found


def _check_arguments(
    key: str, target: Any, node: Mapping[str, Any], given: Sequence[str] = ()
) -> None:
    """Names against the signature of `target`; `given` are arguments that we add ourselves."""
    taken = inspect.signature(target).parameters
    name = f"{target.__module__}.{target.__qualname__}"
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        for argument in node:
            if not argument.startswith("_") and argument not in taken:
                own = [n for n in taken if n not in given]
                raise ConfigError(
                    f"{key}.{argument}: {name} takes no such argument. {_suggest(argument, own)}"
                    f"It takes: {', '.join(own) or 'none'}. To drop it: '~{key}.{argument}'"
                )
        default = taken[argument].default if argument in taken else None
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        value = node[argument]
        fits = isinstance(value, int | float | None) and not isinstance(value, bool)
        if is_number and not fits:
            raise ConfigError(
                f"{key}.{argument}={value}: must be a number, as its default {default}"
            )
    if "_args_" in node:
        return
    for argument, p in taken.items():
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and argument not in node and argument not in given:
            raise ConfigError(f"{key}.{argument}: {name} needs it. Add +{key}.{argument}=VALUE")


def _named_arguments(key: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a target that takes plain values: nothing nested in them is built."""
    for name in node:
        if name.startswith("_") and name != "_target_":
            raise ConfigError(f"{key}.{name}: every argument of the {key} is given by its name")
    return {name: value for name, value in node.items() if name != "_target_"}


def build_model(
    config: Config, input_shape: tuple[int, int, int], num_classes: int
) -> "Callable[[], torch.nn.Module]":
    """A function that makes the model anew, initialised from torch's default generator.

    The target gets `input_shape` and `num_classes` where it takes them and the config does not
    say; lazy layers are given their sizes. Raises ConfigError unless a model can be made whose
    output for images [B, C, H, W] is logits [B, num_classes].
    """
    import torch

    def check(key: str, node: Any) -> None:
        children = node.items() if isinstance(node, Mapping) else enumerate(node)
        for name, child in children:
            if isinstance(child, Mapping | list):
                check(f"{key}.{name}", child)
        if isinstance(node, Mapping) and "_target_" in node and key != "model":
            target = _resolve(key, node, torch.nn.Module, config.trusted_packages)
            _check_arguments(key, target, node)

    check("model", config.model)
    target = _resolve("model", config.model, torch.nn.Module, config.trusted_packages)
    facts = {"input_shape": input_shape, "num_classes": num_classes}
    taken = inspect.signature(target).parameters
    facts = {k: v for k, v in facts.items() if k in taken and k not in config.model}
    _check_arguments("model", target, config.model, tuple(facts))

    def build() -> torch.nn.Module:
        module: torch.nn.Module = instantiate(config.model, **facts, _convert_="all")
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, *input_shape))
        if tuple(logits.shape) != (2, num_classes):
            raise ValueError(
                f"it turns images [2, {', '.join(map(str, input_shape))}] into "
                f"{list(logits.shape)}, but the dataset needs logits [2, {num_classes}]"
            )
        return module.train()

    try:
        with torch.random.fork_rng(devices=[]):
            module = build()
            images = torch.zeros(2, *input_shape)
            loss = torch.nn.functional.cross_entropy(module(images), torch.zeros(2).long())
            if learned := [p for p in module.parameters() if p.requires_grad]:
                torch.autograd.grad(loss, learned, allow_unused=True)
    except (Exception, SystemExit) as error:  # a constructor can raise anything
        raise ConfigError(f"model: {target.__qualname__}: {_last_line(error)}") from error
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"model: {target.__qualname__} has no trainable parameters")
    return build


def build_optimizer(
    config: Config, parameters: "Sequence[torch.nn.Parameter]"
) -> "tuple[type[torch.optim.Optimizer], dict[str, Any]]":
    """The optimizer class and its arguments, tried on `parameters` (which it does not keep)."""
    import torch

    from mnist_exp.optim import UNSUITED

    target = _resolve("optimizer", config.optimizer, torch.optim.Optimizer, config.trusted_packages)
    _check_arguments("optimizer", target, config.optimizer, ("params",))
    for unsuited, why in UNSUITED.items():
        if issubclass(target, unsuited):
            raise ConfigError(f"optimizer._target_: {target.__name__} cannot be used here: {why}")
    arguments = _named_arguments("optimizer", config.optimizer)
    try:
        built = target([torch.nn.Parameter(p.detach().clone()) for p in parameters], **arguments)
        for group in built.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        built.step()
    except Exception as error:  # a constructor can raise anything
        raise ConfigError(f"optimizer: {target.__qualname__}: {_last_line(error)}") from error
    if "lr" not in built.defaults:
        raise ConfigError(f"optimizer: {target.__qualname__} has no lr, which a schedule sets")
    return target, arguments


def build_schedule(config: Config) -> "Schedule":
    """The learning rate schedule."""
    from mnist_exp.optim import Schedule

    target = _resolve("schedule", config.schedule, Schedule, config.trusted_packages)
    _check_arguments("schedule", target, config.schedule)
    arguments = _named_arguments("schedule", config.schedule)
    try:
        schedule: Schedule = target(**arguments)
    except Exception as error:  # a constructor can raise anything
        raise ConfigError(f"schedule: {target.__qualname__}: {_last_line(error)}") from error
    if schedule.warmup_epochs > config.training.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g}: must be at most "
            f"training.epochs ({config.training.epochs})"
        )
    return schedule


def _last_line(error: BaseException) -> str:
    # Hydra wraps what a constructor raised
    inner = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    lines = str(inner).strip().splitlines()
    return lines[0] if lines else type(inner).__name__
