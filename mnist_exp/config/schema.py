"""The types of a config, and a config as plain values."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args

from omegaconf import MISSING, DictConfig, OmegaConf


def checked(
    is_allowed: Callable[[Any], object],
    allowed: str,
    names: Sequence[str] = (),
    default: Any = MISSING,
) -> Any:
    """Declare a key with the check of its value.

    Args:
        is_allowed: The check.
        allowed: What the check allows, in words.
        names: The values that completion offers.
        default: The value in configs on record of before there was such a key.
    """
    metadata = {"is_allowed": is_allowed, "allowed": allowed, "names": names}
    return field(default=default, metadata=metadata)


def one_of(*names: str, default: Any = MISSING) -> Any:
    """Declare a key whose value is one of a few names. `default`: as for `checked`."""
    allowed = f"{', '.join(names[:-1])} or {names[-1]}"
    return checked(names.__contains__, allowed, names, default)


@dataclass
class DatasetConfig:
    """The choice of a data set, and its split."""

    name: str = MISSING
    root: str | None = checked(lambda folder: folder != "", "a folder, or null for the usual one")
    val_size: int | None = checked(lambda n: n is None or n >= 0, "0 or more, or null for a tenth")
    train_size: int | None = checked(lambda n: n is None or n >= 1, "1 or more, or null for all")
    split_seed: int = checked(lambda n: 0 <= n < 2**63, "0 or more, below 2**63")
    classes: list[str] | None = MISSING


@dataclass
class AugmentationConfig:
    """The augmentation of the training images; each key is off at 0."""

    shift: float = checked(lambda pixels: 0 <= pixels <= 14, "from 0 to 14 pixels", default=0.0)
    rotation: float = checked(lambda angle: 0 <= angle <= 180, "from 0 to 180 degrees", default=0.0)
    scale: float = checked(lambda share: 0 <= share < 1, "from 0 to below 1", default=0.0)
    shear: float = checked(lambda angle: 0 <= angle < 45, "from 0 to below 45 degrees", default=0.0)
    elastic: float = checked(lambda pixels: 0 <= pixels <= 10, "from 0 to 10 pixels", default=0.0)
    erase: int = checked(lambda side: side >= 0, "0 or more pixels", default=0)
    mixup: float = checked(  # far from these, the draws of a Beta distribution over- or underflow
        lambda alpha: alpha == 0 or 0.01 <= alpha <= 100, "0, or from 0.01 to 100", default=0.0
    )
    flip: float = checked(lambda p: 0 <= p <= 1, "from 0 to 1, as a probability", default=0.0)


@dataclass
class FocusConfig:
    """The epochs that see hard images and few others."""

    after: float | None = checked(
        lambda epochs: epochs is None or 0 < epochs < 2**31,
        "more than 0, below 2**31, or null",
        default=None,
    )
    hardest: float = checked(lambda share: 0 < share <= 1, "above 0, up to 1", default=0.2)
    random: float = checked(lambda share: 0 <= share < 1, "from 0 to below 1", default=0.1)


@dataclass
class TrainingConfig:
    """The training of a run, beside its model, optimizer and schedule."""

    epochs: int = checked(lambda n: n >= 1, "1 or more")
    batch_size: int = checked(lambda n: 1 <= n < 2**31, "1 or more, below 2**31")
    device: str = checked(
        re.compile(r"auto|cpu|cuda(:\d{1,3})?|mps").fullmatch,
        "auto, cpu, cuda, cuda:N or mps",
        names=("auto", "cpu", "cuda", "mps"),
    )
    threads: int | None = checked(lambda n: n is None or 1 <= n <= 1024, "from 1 to 1024, or null")
    label_smoothing: float = checked(lambda share: 0 <= share < 1, "from 0 to below 1")
    patience: int | None = checked(lambda n: n is None or n >= 1, "1 or more, or null")
    clip_norm: float | None = checked(  # in float32, with quotients of it
        lambda n: n is None or 1e-30 <= n <= 1e30, "from 1e-30 to 1e30, or null", default=None
    )
    decay_norms: bool = True
    ema: float | None = checked(lambda n: n is None or n > 0, "above 0, or null", default=None)
    checkpoint_every: str = checked(
        re.compile(r"[1-9]\d{0,8}( ?steps)?").fullmatch, "a number of epochs, or as in 500steps"
    )
    precision: str = one_of("float32", "bfloat16", default="float32")
    compile: str = one_of("auto", "always", "never")
    focus: FocusConfig = field(default_factory=FocusConfig)


@dataclass
class TrackingConfig:
    """The record of a run in MLflow."""

    uri: str | None = MISSING
    experiment: str = checked(str.strip, "a name")
    run_name: str | None = MISSING
    tags: dict[str, str] = MISSING
    image_every: int | None = checked(lambda n: n is None or n >= 1, "1 or more, or null")
    flush_seconds: float = checked(lambda seconds: 0 <= seconds <= 3600, "from 0 to 3600")
    required: bool = MISSING
    on_end: str | None = checked(
        lambda command: command is None or command.strip(), "a command, or null", default=None
    )
    system: bool = False


@dataclass
class Config:
    """The config of a run."""

    seed: int = checked(lambda n: 0 <= n < 2**63, "0 or more, below 2**63")
    trusted_packages: list[str] = MISSING
    dataset: DatasetConfig = MISSING
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    schedule: dict[str, Any] = MISSING
    training: TrainingConfig = MISSING
    tracking: TrackingConfig = MISSING


@dataclass
class SweepConfig:
    """The part of a config that concerns its sweep, and no run."""

    on_error: str = one_of("continue", "stop")  # what happens once a job has failed
    skip_invalid: bool = MISSING
    test: str = one_of("chosen", "all")
    max_jobs: int = checked(lambda n: n >= 1, "1 or more")

    @classmethod
    def from_record(cls, settings: Mapping[str, Any]) -> "SweepConfig":
        """Return the settings that a sweep was started with.

        Keys that are known no more are left out: `yes` was in the place of `max_jobs`, which
        matters before a sweep begins and never after.
        """
        return cls(**{key: settings[key] for key in cls.__annotations__ if key in settings})


@dataclass
class Schema(Config):
    """All that can be typed: the config of a run, and the settings of its sweep."""

    sweep: SweepConfig = MISSING


@dataclass
class StackedLauncher:
    """The options of `hydra/launcher=stacked`, which this project runs itself."""

    max_stack: int | None = None  # models trained together; None: what is fastest on the device


OPEN_PARTS = ("model", "optimizer", "schedule")
_KINDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts, as in [a,b]",
}


def values_of(key: str) -> Sequence[str]:
    """Return the names that a dotted key can have as its value, where those are a few."""
    declared = _declaration(key)
    return declared.metadata.get("names", ()) if declared else ()


def allowed_values(key: str) -> str:
    """Return what a dotted key takes, in words: "a number, from 0 to 14 pixels"; "" of a part."""
    declared = _declaration(key)
    if declared is None:
        return ""
    is_union = isinstance(declared.type, UnionType)
    kind, *others = get_args(declared.type) if is_union else [declared.type]
    allowed = declared.metadata.get("allowed")
    if kind is str and allowed:
        return str(allowed)
    in_words = _KINDS.get(kind)
    if in_words is None:
        return ""
    return f"{in_words}, {allowed}" if allowed else in_words + (", or null" if others else "")


def parts(kind: Any = Schema, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each part that holds keys: the name of its class, and its dotted key."""
    for declared in fields(kind):
        inside: Any = declared.type
        if isinstance(inside, type) and is_dataclass(inside):
            yield inside.__name__, f"{prefix}{declared.name}"
            yield from parts(inside, f"{prefix}{declared.name}.")


def _declaration(key: str) -> Field[Any] | None:
    kind: Any = Schema
    declared = None
    for name in key.split("."):
        inside = fields(kind) if is_dataclass(kind) else ()
        declared = next((f for f in inside if f.name == name), None)
        kind = getattr(declared, "type", None)
    return declared


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config as dotted names and plain values: ("optimizer.lr", 0.1). Lists are values."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def task_config(config: DictConfig) -> DictConfig:
    """Return the config of the run itself, without Hydra's own part, and the sweep's."""
    keys = [str(key) for key in config if key not in ("hydra", "sweep")]
    return OmegaConf.masked_copy(config, keys)


def defaults_of_old(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that a config on record may lack.

    Each is with the value that training had before there was the key.
    """
    for declared in fields(kind):
        name = f"{prefix}{declared.name}"
        if is_dataclass(declared.type):
            yield from defaults_of_old(declared.type, f"{name}.")
        elif declared.default != MISSING:
            yield name, declared.default


def identity(config: DictConfig) -> str:
    """Return the SHA-256 of all that a run's numbers depend on: the config less `tracking`.

    A key with the value that older configs stand for is left out, so that a run is known by the
    same digest whether its config was composed before there was such a key or after.
    """
    old = dict(defaults_of_old())
    values = {
        name: value
        for name, value in leaves(config)
        if not name.startswith("tracking.") and (name not in old or value != old[name])
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
