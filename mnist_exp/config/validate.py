"""A typed config from a composed one: values out of range are refused, by their key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.config.explain import explain
from mnist_exp.config.schema import ONE_OF, OPEN_PARTS, Config, SweepConfig, leaves
from mnist_exp.errors import ConfigError

if TYPE_CHECKING:
    pass

FLOAT32_MAX = 3.4e38
_EVERY = re.compile(r"[1-9]\d{0,8}( ?steps)?")


OWN_PACKAGES = ("mnist_exp", "torch.nn", "torch.optim")


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
    _need(typed.max_jobs >= 1, "sweep.max_jobs", typed.max_jobs, "1 or more")
    return typed


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
                check_target(name, value, typed.trusted_packages)
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


def check_target(key: str, target: Any, trusted: Sequence[str], home: str = "") -> None:
    """`home`: where the thing that `target` leads to is defined, once that is known."""
    allowed = (*OWN_PACKAGES, *trusted)
    if not any(str(home or target).startswith(f"{p}.") for p in allowed):
        leads = f" leads to {home}" if home else ""
        raise ConfigError(
            f"{key}={target}{leads}: this target is not allowed. "
            f"Targets come from {', '.join(allowed)}; "
            f"to trust another package: trusted_packages=[PACKAGE]"
        )
