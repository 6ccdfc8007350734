"""Building what a config names; arguments of `model`, `optimizer` and `schedule` are checked."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.config.hydra_adapter import import_target, instantiate_target
from mnist_exp.config.schema import Config
from mnist_exp.config.validate import check_target
from mnist_exp.errors import ConfigError, Terminated, first_line
from mnist_exp.run.arguments import check_arguments
from mnist_exp.training.optimizers import UNSUPPORTED
from mnist_exp.training.precision import PRECISIONS
from mnist_exp.training.schedules import Schedule
from mnist_exp.training.stack import Stack


def build_model(
    config: Config, input_shape: tuple[int, int, int], num_classes: int
) -> Callable[[], nn.Module]:
    """Return a function that makes the model anew, initialised from torch's default generator.

    The model's class gets `input_shape` and `num_classes` where it takes them and the config does
    not give them; lazy layers are given their sizes.

    Args:
        config: The config of a run.
        input_shape: The shape of an image, (C, H, W).
        num_classes: The number of logits.

    Raises:
        ConfigError: No model can be made whose output for images [B, C, H, W] is logits
            [B, num_classes].
    """
    node = config.model
    _check_nested_targets("model", node, config.trusted_packages)
    target = _target_class("model", node, nn.Module, config.trusted_packages)
    parameters = inspect.signature(target).parameters
    sizes = {"input_shape": input_shape, "num_classes": num_classes}
    added = {k: v for k, v in sizes.items() if k in parameters and k not in node}
    check_arguments("model", target, node, tuple(added))

    def build() -> nn.Module:
        module: nn.Module = instantiate_target(node, **added)
        with torch.no_grad():
            images = torch.zeros(2, *input_shape)
            check_logits(module.eval()(images), images, num_classes)
        return module.train()

    with explaining("model", target.__qualname__), torch.random.fork_rng(devices=[]):
        if not any(parameter.requires_grad for parameter in build().parameters()):
            raise ValueError("it has no trainable parameters")
    return build


def check_logits(logits: Any, images: Tensor, num_classes: int) -> None:
    """Raise ValueError unless what a model makes of images is a tensor of logits."""
    shape = [len(images), num_classes]
    if not isinstance(logits, Tensor):
        result = f"a {type(logits).__name__}"
    elif list(logits.shape) != shape:
        result = str(list(logits.shape))
    elif not logits.is_floating_point():
        result = f"a tensor of {logits.dtype}"
    else:
        return
    raise ValueError(
        f"it turns images {list(images.shape)} into {result}, but the dataset needs logits "
        f"{shape}, a tensor of floats"
    )


def restore_weights(stack: Stack, weights: Mapping[str, Tensor]) -> None:
    """Give a stack of one the weights that the `state_dict` of its model has held."""
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in weights.items()})


def optimizer_class(config: Config) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the optimizer's class and its arguments, whose names are checked.

    Raises:
        ConfigError: The class is none that can be used here, or takes no such arguments.
    """
    node = config.optimizer
    target = _target_class("optimizer", node, torch.optim.Optimizer, config.trusted_packages)
    arguments = _named_arguments("optimizer", node)
    for unsuited, why in UNSUPPORTED.items():
        if issubclass(target, unsuited):
            raise ConfigError(f"optimizer._target_: {target.__name__} cannot be used here: {why}")
    if "params" in node:
        raise ConfigError(
            "optimizer.params: it takes the parameters of the model, always. To drop it: "
            "'~optimizer.params'"
        )
    check_arguments("optimizer", target, node, ("params",))
    return target, arguments


def build_schedule(config: Config) -> Schedule:
    """Return the learning rate schedule. Raise ConfigError if it cannot be made."""
    target = _target_class("schedule", config.schedule, Schedule, config.trusted_packages)
    arguments = _named_arguments("schedule", config.schedule)
    check_arguments("schedule", target, config.schedule)
    with explaining("schedule", target.__qualname__):
        schedule: Schedule = target(**arguments)
    if schedule.warmup_epochs > config.training.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g}: must be at most "
            f"training.epochs ({config.training.epochs})"
        )
    return schedule


def augmentation_of(config: Config) -> Augmentation:
    """Return what the training images of a run go through."""
    return Augmentation(**asdict(config.augmentation))


def precision_of(config: Config) -> torch.dtype:
    """Return the type in which the model of a run computes."""
    return PRECISIONS[config.training.precision]


@contextlib.contextmanager
def explaining(key: str, name: str) -> Iterator[None]:
    """Raise ConfigError in place of whatever the class of this name, which is at `key`, raises."""
    try:
        yield
    except Terminated:  # by a signal, which had nothing to do with the class
        raise
    except (Exception, SystemExit) as error:
        reason = first_line(error)
        if "can't allocate memory" in reason:  # torch has no class of its own for it on a CPU
            reason = "it needs more memory than there is. Make it smaller"
        raise ConfigError(f"{key}: {name}: {reason}") from error


def _check_nested_targets(key: str, node: Any, trusted: Sequence[str]) -> None:
    """Check the classes, and their arguments, that are nested in the node of a model."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, child in children:
        if not isinstance(child, Mapping | list):
            continue
        _check_nested_targets(f"{key}.{name}", child, trusted)
        if isinstance(child, Mapping) and "_target_" in child:
            target = _target_class(f"{key}.{name}", child, nn.Module, trusted)
            check_arguments(f"{key}.{name}", target, child)


def add_to_import_path(folder: str) -> None:
    """Let the modules in a folder be imported, unless they can be already."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _target_class(key: str, node: Mapping[str, Any], base: type, trusted: Sequence[str]) -> Any:
    """Return the class that a node names.

    An import path may lead through a module into its imports (`torch.nn.modules.os`), so what it
    leads to is checked as well.

    Args:
        key: The dotted key of the node, for messages.
        node: A part of a config, with a `_target_`.
        base: The class that the target has to extend.
        trusted: Packages that the class may come from besides torch and this one.

    Raises:
        ConfigError: It cannot be imported, or is not what is allowed.
    """
    path = node.get("_target_")
    check_target(f"{key}._target_", path, trusted)
    is_trusted = any(str(path).startswith(f"{package}.") for package in trusted)
    if is_trusted:
        add_to_import_path(os.getcwd())
    try:
        target = import_target(str(path))
    except Exception as error:  # importing somebody's module can raise anything
        reason = " ".join(str(error).split("\n", 1)[-1].split())  # the first line says no more
        if is_trusted:
            reason += f" It was looked for in {os.getcwd()} as well"
        raise ConfigError(f"{key}._target_={path}: it cannot be imported. {reason}") from error
    is_class = inspect.isclass(target) and issubclass(target, base)
    home = f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', '?')}"
    check_target(f"{key}._target_", path, trusted, home)
    if not is_class or inspect.isabstract(target):
        raise ConfigError(f"{key}._target_={path}: must be a class that extends {base.__name__}")
    return target


def _named_arguments(key: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a node whose values are plain: nothing nested in them is built."""
    for name in node:
        if name.startswith("_") and name != "_target_":
            raise ConfigError(f"{key}.{name}: every argument of the {key} is given by its name")
    return {name: value for name, value in node.items() if name != "_target_"}
