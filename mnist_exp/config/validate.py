"""A typed config from a composed one: values out of range are refused, by their key."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.config.explain import explain
from mnist_exp.config.schema import (
    OPEN_PARTS,
    Config,
    FocusConfig,
    SweepConfig,
    TrainingConfig,
    leaves,
)
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import is_number

FLOAT32_MIN, FLOAT32_MAX = 1.2e-38, 3.4e38
CHARACTERS = ("mnist", "qmnist", "emnist", "kmnist")  # the data sets of digits and letters
OWN_PACKAGES = ("mnist_exp", "torch.nn", "torch.optim")  # where targets may come from


def validate(config: DictConfig) -> Config:
    """Return the typed config of a run. Raise ConfigError for the first key that is out of range.

    Needs no torch: what a target takes, and a device's presence, are checked when it is built.
    """
    typed: Config = _typed(Config, config)
    for part in OPEN_PARTS:
        for name, value in leaves(getattr(typed, part), f"{part}."):
            if isinstance(value, float) and value and not FLOAT32_MIN < abs(value) < FLOAT32_MAX:
                allowed = f"a finite float32: 0, or from {FLOAT32_MIN} to {FLOAT32_MAX} in size"
                raise _out_of_range(name, value, allowed)
            if name.endswith("_target_"):
                check_target(name, value, typed.trusted_packages)
    _check_focus(typed.training)
    lr = typed.optimizer.get("lr", 0.0)
    if not is_number(lr) or lr < 0:
        raise _out_of_range("optimizer.lr", lr, "a number of 0 or more")
    training = typed.training
    if training.ema is not None and training.ema > training.epochs:
        raise _out_of_range(
            "training.ema",
            f"{training.ema:g}",
            f"at most training.epochs ({training.epochs}), or null for no average",
        )
    return typed


def validate_sweep(config: DictConfig) -> SweepConfig:
    """Return the sweep's part of a composed config, typed. Raise ConfigError as `validate` does."""
    typed: SweepConfig = _typed(SweepConfig, config.sweep, "sweep.")
    return typed


def _typed(kind: type, node: DictConfig, prefix: str = "") -> Any:
    """Return a node as a dataclass of this kind, with its interpolations resolved.

    Raise ConfigError for a value that is missing, or not allowed; its key begins with `prefix`.
    """
    try:
        if missing := OmegaConf.missing_keys(node):
            key = prefix + min(missing)
            raise ConfigError(f"{key} has no value yet: add {key}=VALUE")
        OmegaConf.resolve(node)
        # as plain values, because a typed node keeps the keys that +KEY=VALUE has added to it
        plain = OmegaConf.to_container(node)
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
    except OmegaConfBaseException as error:
        raise explain(error) from error
    _check_values(typed, prefix)
    return typed


def _check_values(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value that its declaration in a dataclass does not allow."""
    for declared in fields(config):
        key, value = f"{prefix}{declared.name}", getattr(config, declared.name)
        if is_dataclass(value):
            _check_values(value, f"{key}.")
        elif declared.metadata and not declared.metadata["is_allowed"](value):
            raise _out_of_range(key, value, declared.metadata["allowed"])


def _check_focus(training: TrainingConfig) -> None:
    """Raise ConfigError if no epoch is left for the hardest images, or the shares are too large."""
    focus, epochs = training.focus, training.epochs
    if focus.after is None:
        return
    if focus.after > epochs - 1:
        raise ConfigError(
            f"training.focus.after={focus.after:g}: leaves none of training.epochs ({epochs}) for "
            f"the hardest images. Add training.epochs={math.ceil(focus.after) + 1}, or "
            f"training.focus.after={epochs - 1 or 'null'}"
        )
    if focus.hardest + focus.random > 1 + 1e-9:  # as 0.9 + 0.1 may come to a little more than 1
        rest = f"{round(1 - focus.hardest, 9):.9g}"
        raise ConfigError(
            f"training.focus.random={focus.random}: must be at most {rest}, what "
            f"training.focus.hardest ({focus.hardest}) leaves. Add training.focus.random={rest}"
        )


def _out_of_range(key: str, value: Any, allowed: str) -> ConfigError:
    shown = "null" if value is None else value
    return ConfigError(f"{key}={shown}: must be {allowed}")


def likely_mistakes(configs: Sequence[Config]) -> list[str]:
    """Return warnings of settings that are allowed but probably not meant.

    Each comes once for all configs.
    """
    return [text for text in (_mirrored_characters(configs), _idle_focus(configs)) if text]


def _mirrored_characters(configs: Sequence[Config]) -> str:
    """Return a warning if images of digits or letters are mirrored, or ""."""
    for config in configs:
        flip, name = config.augmentation.flip, config.dataset.name
        if flip and name.startswith(CHARACTERS):
            return (
                f"augmentation.flip={flip:g}: it mirrors the images of {name}, and a mirrored "
                f"digit or letter is another one, or none. To leave it out: augmentation.flip=0"
            )
    return ""


def _idle_focus(configs: Sequence[Config]) -> str:
    """Return a warning if shares of hard or random images are given for no run, or ""."""
    usual, parts = FocusConfig(), [config.training.focus for config in configs]
    if any(part.after is not None for part in parts):  # of a sweep, the others may be its baseline
        return ""
    for key in ("hardest", "random"):
        for part in parts:
            if (share := getattr(part, key)) != getattr(usual, key):
                return (
                    f"training.focus.{key}={share:g}: it has no effect without "
                    f"training.focus.after, the epochs over all images before. To have it: "
                    f"training.focus.after=1"
                )
    return ""


@dataclass(frozen=True)
class Every:
    """An interval after which something is due, in epochs or in steps; the other is 0."""

    epochs: int
    steps: int


def checkpoint_every(text: str) -> Every:
    """Read `training.checkpoint_every`, validated: "1" is epochs, "500steps" is steps."""
    number = int(re.sub(r"\D", "", text))
    return Every(0, number) if text.endswith("steps") else Every(number, 0)


def check_target(key: str, target: Any, trusted: Sequence[str], home: str = "") -> None:
    """Raise ConfigError for a target of a package that is not trusted.

    Args:
        key: The key of the config that has the target.
        target: The dotted path, as it is written there.
        trusted: The packages that `trusted_packages` names.
        home: Where the thing that `target` leads to is defined, once that is known.
    """
    allowed = (*OWN_PACKAGES, *trusted)
    if not str(home or target).startswith(tuple(f"{package}." for package in allowed)):
        leads = f" leads to {home}" if home else ""
        raise ConfigError(
            f"{key}={target}{leads}: this target is not allowed. "
            f"Targets come from {', '.join(allowed)}; "
            f"to trust another package: trusted_packages=[PACKAGE]"
        )
