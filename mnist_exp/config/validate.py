"""A typed config from a composed one: values out of range are refused, by their key."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.config.explain import explain
from mnist_exp.config.schema import ONE_OF, OPEN_PARTS, Config, SweepConfig, leaves
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import is_number

FLOAT32_MAX = 3.4e38
OWN_PACKAGES = ("mnist_exp", "torch.nn", "torch.optim")  # where targets may come from

Rule = tuple[str, Callable[[Any], object], str]  # a key, the check of its value, what is allowed


def _one_of(key: str) -> Rule:
    *names, last = ONE_OF[key]
    return key, ONE_OF[key].__contains__, f"{', '.join(names)} or {last}"


RULES: list[Rule] = [
    ("seed", lambda n: 0 <= n < 2**63, "0 or more, below 2**63"),
    ("dataset.root", lambda folder: folder != "", "a folder, or null for the usual one"),
    ("dataset.val_size", lambda n: n is None or n >= 0, "0 or more, or null for a tenth"),
    ("dataset.train_size", lambda n: n is None or n >= 1, "1 or more, or null for all"),
    ("dataset.split_seed", lambda n: 0 <= n < 2**63, "0 or more, below 2**63"),
    ("training.epochs", lambda n: n >= 1, "1 or more"),
    ("training.batch_size", lambda n: 1 <= n < 2**31, "1 or more, below 2**31"),
    ("training.device", re.compile(r"auto|cpu|cuda(:\d{1,3})?|mps").fullmatch,
     "auto, cpu, cuda, cuda:N or mps"),
    ("training.threads", lambda n: n is None or 1 <= n <= 1024, "from 1 to 1024, or null"),
    ("training.label_smoothing", lambda share: 0 <= share < 1, "from 0 to below 1"),
    ("training.patience", lambda n: n is None or n >= 1, "1 or more, or null"),
    ("training.checkpoint_every", re.compile(r"[1-9]\d{0,8}( ?steps)?").fullmatch,
     "a number of epochs, or as in 500steps"),
    _one_of("training.compile"),
    ("tracking.image_every", lambda n: n is None or n >= 1, "1 or more, or null"),
    ("tracking.flush_seconds", lambda seconds: 0 <= seconds <= 3600, "from 0 to 3600"),
    ("tracking.experiment", str.strip, "a name"),
]  # fmt: skip
SWEEP_RULES: list[Rule] = [
    _one_of("sweep.on_error"),
    _one_of("sweep.test"),
    ("sweep.max_jobs", lambda n: n >= 1, "1 or more"),
]


def validate(config: DictConfig) -> Config:
    """Return the typed config of a run. Raise ConfigError for the first key that is out of range.

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
    _check(RULES, typed)
    if typed.dataset.root is not None:  # a record must not depend on where the command was typed
        root = os.path.realpath(os.path.expanduser(typed.dataset.root))
        typed.dataset.root = config.dataset.root = root
    for part in OPEN_PARTS:
        for name, value in leaves(getattr(typed, part), f"{part}."):
            if isinstance(value, float) and not abs(value) < FLOAT32_MAX:
                raise _out_of_range(name, value, "a finite float32")
            if name.endswith("_target_"):
                check_target(name, value, typed.trusted_packages)
    lr = typed.optimizer.get("lr", 0.0)
    if not is_number(lr) or lr < 0:
        raise _out_of_range("optimizer.lr", lr, "a number of 0 or more")
    return typed


def validate_sweep(config: DictConfig) -> SweepConfig:
    """Return the sweep's part of a composed config, typed. Raise ConfigError as `validate` does."""
    try:
        typed = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(SweepConfig), config.sweep)
        )
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(typed, SweepConfig)
    _check(SWEEP_RULES, typed, "sweep.")
    return typed


def _check(rules: Iterable[Rule], config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first rule that a config, whose keys lack `prefix`, breaks."""
    for key, is_allowed, allowed in rules:
        value = attrgetter(key.removeprefix(prefix))(config)
        if not is_allowed(value):
            raise _out_of_range(key, value, allowed)


def _out_of_range(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{key}={value}: must be {allowed}")


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
