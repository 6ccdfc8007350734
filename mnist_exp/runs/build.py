"""From the open parts of a config (`model`, `optimizer`, `schedule`) to objects."""

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mnist_exp.config.hydra_adapter import import_target, instantiate_target
from mnist_exp.config.schema import Config
from mnist_exp.config.validate import check_target
from mnist_exp.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

    from mnist_exp.training.schedules import Schedule


def _target_class(key: str, node: Mapping[str, Any], base: type, trusted: Sequence[str]) -> Any:
    """The class that `node` names, its arguments checked against its signature.

    An import path may lead through a module into its imports (`torch.nn.modules.os`), so what it
    leads to is checked as well: a subclass of `base`, defined in a package that is allowed.
    """
    target = node.get("_target_")
    check_target(f"{key}._target_", target, trusted)
    if any(str(target).startswith(f"{p}.") for p in trusted) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module beside where the command is typed
    try:
        found = import_target(str(target))
    except Exception as error:  # importing somebody's module can raise anything
        reason = " ".join(str(error).split("\n", 1)[-1].split())  # the first line says no more
        raise ConfigError(f"{key}._target_={target}: it cannot be imported. {reason}") from error
    is_class = inspect.isclass(found) and issubclass(found, base)
    home = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', '?')}"
    check_target(f"{key}._target_", target, trusted, home)
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
                    f"{key}.{argument}: {name} takes no such argument. "
                    f"{did_you_mean(argument, own)}It takes: {', '.join(own) or 'none'}. "
                    f"To drop it: '~{key}.{argument}'"
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
            target = _target_class(key, node, torch.nn.Module, config.trusted_packages)
            _check_arguments(key, target, node)

    check("model", config.model)
    target = _target_class("model", config.model, torch.nn.Module, config.trusted_packages)
    facts = {"input_shape": input_shape, "num_classes": num_classes}
    taken = inspect.signature(target).parameters
    facts = {k: v for k, v in facts.items() if k in taken and k not in config.model}
    _check_arguments("model", target, config.model, tuple(facts))

    def build() -> torch.nn.Module:
        module: torch.nn.Module = instantiate_target(config.model, **facts)
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
        raise ConfigError(f"model: {target.__qualname__}: {first_line(error)}") from error
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"model: {target.__qualname__} has no trainable parameters")
    return build


def build_optimizer(
    config: Config, parameters: "Sequence[torch.nn.Parameter]"
) -> "tuple[type[torch.optim.Optimizer], dict[str, Any]]":
    """The optimizer class and its arguments, tried on `parameters` (which it does not keep)."""
    import torch

    from mnist_exp.training.optimizers import UNSUPPORTED

    target = _target_class(
        "optimizer", config.optimizer, torch.optim.Optimizer, config.trusted_packages
    )
    _check_arguments("optimizer", target, config.optimizer, ("params",))
    for unsuited, why in UNSUPPORTED.items():
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
        raise ConfigError(f"optimizer: {target.__qualname__}: {first_line(error)}") from error
    if "lr" not in built.defaults:
        raise ConfigError(f"optimizer: {target.__qualname__} has no lr, which a schedule sets")
    return target, arguments


def build_schedule(config: Config) -> "Schedule":
    """The learning rate schedule."""
    from mnist_exp.training.schedules import Schedule

    target = _target_class("schedule", config.schedule, Schedule, config.trusted_packages)
    _check_arguments("schedule", target, config.schedule)
    arguments = _named_arguments("schedule", config.schedule)
    try:
        schedule: Schedule = target(**arguments)
    except Exception as error:  # a constructor can raise anything
        raise ConfigError(f"schedule: {target.__qualname__}: {first_line(error)}") from error
    if schedule.warmup_epochs > config.training.epochs:
        raise ConfigError(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g}: must be at most "
            f"training.epochs ({config.training.epochs})"
        )
    return schedule
