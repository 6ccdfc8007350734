"""What is wrong with an override or a recipe, in words."""

import contextlib
import re
import shlex
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mnist_exp.config.hydra_adapter import (
    COMPOSITION_ERRORS,
    RECIPE_FILES,
    compose_raw,
    hydra_words,
)
from mnist_exp.config.schema import OPEN_PARTS, leaves
from mnist_exp.errors import ConfigError, did_you_mean


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """One of Hydra's or OmegaConf's errors, as the one message that a person needs."""
    message = _explanation(error, overrides)
    if file := re.match(r"In '(\S+)/(\S+)': ", str(error)):
        message = f"{RECIPE_FILES.get(file[2], f'{file[1]}/{file[2]}.yaml')}: {message}"
    elif isinstance(error, MissingConfigException):
        group = str(error.missing_cfg_file).rpartition("/")[0]
        typed = {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}
        if group not in typed and "experiments" in typed:
            recipe = typed["experiments"]
            message = f"{RECIPE_FILES.get(recipe, recipe)}: {message}"
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
            f"{did_you_mean(option, error.options)}{group} can be: {', '.join(error.options)}"
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
    groups = [str(g) for g in compose_raw([]).hydra.runtime.choices if "/" not in str(g)]
    parent, _, name = key.rpartition(".")
    if parent == "tracking.tags":
        return f"{key}: there is no such tag yet. To add it: +{key}=VALUE"
    message = f"{key}: there is no such key. {did_you_mean(key, known + groups)}"
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
            config = compose_raw(hydra_words(words, None))
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
