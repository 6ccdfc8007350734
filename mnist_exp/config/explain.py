"""What is wrong with an override or a recipe, in words."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from mnist_exp.config.hydra_adapter import RECIPE_FILES, compose_leniently, compose_raw
from mnist_exp.config.schema import OPEN_PARTS, allowed_values, defaults_of_old, leaves, parts
from mnist_exp.errors import ConfigError, did_you_mean, first_line
from mnist_exp.formatting import as_typed

_TO_SWEEP = "add -m (in Python: train_sweep)"


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """Return one of Hydra's or OmegaConf's errors as the one message that a person needs."""
    fault = _fault(error, overrides)
    messages = filter(None, (explainer(fault) for explainer in _EXPLAINERS))  # the first counts
    message = next(messages, None) or "\n".join(
        line for line in fault.text.splitlines() if line and not line.startswith("See https")
    )
    if file := re.match(r"In '(\S+)/(\S+)': ", str(error)):
        message = f"{RECIPE_FILES.get(file[2], f'{file[1]}/{file[2]}.yaml')}: {message}"
    elif isinstance(error, MissingConfigException):
        group = str(error.missing_cfg_file).rpartition("/")[0]
        typed = {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}
        if group not in typed and "experiments" in typed:
            recipe = typed["experiments"]
            message = f"{RECIPE_FILES.get(recipe, recipe)}: {message}"
    return ConfigError(message)


@dataclass(frozen=True)
class _Fault:
    """An error, with what it says of itself."""

    error: Exception
    cause: BaseException  # what a file leads to is raised in the place of its cause
    text: str
    key: str  # at fault; '' where that is not known
    overrides: Sequence[str]


def _fault(error: Exception, overrides: Sequence[str]) -> _Fault:
    # OmegaConf raises a template, and from it the error in which the value is filled in
    causes = (
        each
        for each in (error.__cause__, error.__context__)
        if isinstance(each, OmegaConfBaseException) and "$VALUE" not in str(each)
    )
    cause = next(causes, error)
    text = _in_plain_words(str(error))
    written = re.search(r"^ +full_key: (\S+)$", text, re.MULTILINE)
    key = getattr(cause, "full_key", None) or (written[1] if written else "")
    return _Fault(error, cause, text, key, overrides)


def _in_plain_words(text: str) -> str:
    return text.replace("Integer", "a whole number").replace("Float", "a number")


def _explain_choice(fault: _Fault) -> str | None:
    """Explain a group that is given an option which is not there."""
    if not isinstance(fault.error, MissingConfigException) or fault.error.options is None:
        return None
    group, _, option = str(fault.error.missing_cfg_file).rpartition("/")
    if group.startswith("experiments/"):
        group = group.removeprefix("experiments/")
        return f"in its defaults, {group}: {option} has to be: override /{group}: {option}"
    return (
        f"{group}={option}: there is no such choice. {did_you_mean(option, fault.error.options)}"
        f"{group} can be: {', '.join(fault.error.options)}"
    )


def _explain_override(fault: _Fault) -> str | None:
    """Explain an override of a key that is not there, or of one that takes no such thing."""
    if fault.key.split(".")[0] in ("experiments", "debug") and "not in" in str(fault.cause):
        return "a recipe has to begin with the line: # @package _global_"  # its keys are there
    if found := re.search(r"Could not override '([^']+)'", fault.text):
        return _unknown_key(fault.key or found[1], fault.overrides)
    is_no_name = fault.text.startswith("Config group override must be")
    if is_no_name or isinstance(fault.error, TypeError):  # of a list with what is no text
        return _no_names(fault.overrides)
    if found := re.match(r"Multiple values for (\S+)\. To override", fault.text):
        added = [word for word in fault.overrides if word.startswith(f"+{found[1]}=")]
        return "".join(
            f"{word}: {found[1]} has a choice already. To put another in its place: {word[1:]}"
            for word in added[:1]
        )
    if found := re.match(r"Ambiguous value for argument '(.+)'", fault.text):
        name, _, values = found[1].partition("=")
        takes_list = "list" in (allowed_values(name) or "list")
        as_list = f". As a list: '{name}=[{values}]'" if takes_list else ""
        return f"{found[1]}: several values are a sweep: {_TO_SWEEP}{as_list}"
    if found := re.match(r"Sweep parameters '(.+)' requires --multirun", fault.text):
        name = found[1].partition("=")[0]
        return f"{found[1]}: that is a sweep: {_TO_SWEEP}. For one run: {name}=VALUE"
    return None


def _explain_missing_recipe(fault: _Fault) -> str | None:
    """Explain a recipe that begins with another one, which is not there."""
    found = re.search(r"Could not load 'experiments/([^']+)'", fault.text)
    if found is None:
        return None
    options = _options(compose_raw([])[0], "experiments")
    return (
        f"in its defaults, {found[1]}: there is no such recipe. {did_you_mean(found[1], options)}"
        f"The recipes are: {', '.join(options)}"
    )


def _explain_part(fault: _Fault) -> str | None:
    """Explain a part with keys of its own that is given a plain value."""
    found = re.search(r"\w+ is not a subclass of (\w+)\. value: (.*)", str(fault.cause))
    part = dict(parts()).get(found[1]) if found else None
    if found is None or part is None:
        return None
    message = f"{part}: takes no value itself, and is given {found[2]}"
    context, config = compose_raw([])
    if part in config.hydra.runtime.choices:
        return (
            f"{message}. To choose one of its options, {', '.join(_options(context, part))}: "
            f"{part}=OPTION, or in a recipe, in its defaults, override /{part}: OPTION"
        )
    return f"{message}. {_siblings(part, _keys(config))}"


def _explain_interpolation(fault: _Fault) -> str | None:
    """Explain the choice of a group that refers to what cannot be found."""
    if fault.key != "_dummy_":  # the name that Hydra gives to what it resolves for a choice
        return None
    found = re.search(r"resolving interpolation '(.+?)', possible", fault.text)
    asked = found[1] if found else "an interpolation"
    typed = [word for word in fault.overrides if asked in word]  # unless it is in a recipe
    where = " ".join(typed) or asked
    return f"{where}: {_reason(fault.cause)}. A choice can refer to other choices only"


def _options(context: HydraContext, group: str) -> list[str]:
    """Return the options of a group; of recipes, those that have a name."""
    # with a config's name and overrides, Hydra looks into the folder of recipes as well
    options = context.config_loader.get_group_options(group, ObjectType.CONFIG, "config", [])
    return [name for name in options if name not in RECIPE_FILES]


def _reason(error: BaseException) -> str:
    """Return the first line of an error of OmegaConf's, without the names of its classes."""
    line = _in_plain_words(first_line(error))
    resolving = re.match(r"\w+ raised while resolving interpolation: \"?(.+?)\"?$", line)
    return resolving[1] if resolving else line


def _no_names(overrides: Sequence[str]) -> str:
    """Return the message for a group that is given what is no name."""
    context, config = compose_raw([])
    message = "a group takes the name of one of its choices"
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, value = override.key_or_group, override.value()
        names = value if isinstance(value, list) else [value]
        is_group = group in config.hydra.runtime.choices
        if is_group and not all(isinstance(name, str) for name in names):
            options = ", ".join(_options(context, group))
            return f"{override.input_line}: {message}. {group} can be: {options}"
    return f"{message}, as in model=cnn"


def _explain_removal(fault: _Fault) -> str | None:
    """Explain a key that is to be removed, and cannot be."""
    missing = re.match(r"Could not delete from config. '(.+)' does not exist", fault.text)
    if not missing and "does not support deletion" not in str(fault.cause):
        return None
    key, config = missing[1] if missing else fault.key, compose_raw([])[1]
    known = _keys(config)
    if key in known:
        default = as_typed(OmegaConf.select(config, key))
        return f"~{key}: cannot be removed. To have its default: {key}={default}"
    if siblings := _siblings(key, known):
        return f"~{key}: cannot be removed. {siblings}"
    return _unknown_key(key, fault.overrides)


def _explain_value(fault: _Fault) -> str | None:
    """Explain a value that its key cannot have."""
    key, reason = fault.key, _reason(fault.cause)
    if reason.startswith("Cannot merge DictConfig with ListConfig"):
        return f"{key or 'the file'}: holds keys with their values, and is given a list"
    if not key:
        return None
    if isinstance(fault.cause, MissingMandatoryValue):
        return f"{key} has no value: add {key}=VALUE"
    if "not in" in str(fault.cause):
        return _unknown_key(key, fault.overrides)
    if key.startswith("tracking.tags."):
        return f"{key}: a tag's value is text. A name with dots: '+tracking.tags={{a.b: TEXT}}'"
    siblings = _siblings(key, _keys(compose_raw([])[1]))
    if isinstance(fault.cause, ValidationError) and (allowed := allowed_values(key)):
        return f"{key}={as_typed(fault.cause.value)}: must be {allowed}"
    if "is not Optional" in reason:
        return f"{key}=null: it holds keys. {_switching_off(key) or siblings}"
    return f"{key}: {reason}"


def _switching_off(key: str) -> str:
    """Return what to type for nothing of a part, "" where there is no such thing."""
    if key == "tracking.tags":
        return f"For none: {key}={{}}"
    if "." not in key:  # training, tracking, ...: nothing switches off a whole part
        return ""
    off = [n for n, value in defaults_of_old() if n.startswith(f"{key}.") and value is None]
    return f"To switch it off: {off[0]}=null" if off else ""


def _explain_grammar(fault: _Fault) -> str | None:
    """Explain an override that Hydra cannot read, or cannot compose with the others."""
    if isinstance(fault.error, AssertionError):
        return f"{' '.join(fault.overrides)}: cannot be composed ({fault.text})"
    if not isinstance(fault.error, OverrideParseException):
        return None
    word = str(fault.error.override)
    if found := re.search(r"\w+ while evaluating '(.*)': (.*)\n?(Available: .*)?", fault.text):
        known = f". {found[3].replace('Available: ', 'The functions are: ')}" if found[3] else ""
        return f"{word}: {found[2]}{known}"
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


_EXPLAINERS = (
    _explain_choice,
    _explain_missing_recipe,
    _explain_override,
    _explain_removal,
    _explain_part,
    _explain_interpolation,
    _explain_value,
    _explain_grammar,
)


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Return the message for a key that is not there, with the keys that are."""
    # once the other overrides are
    _, config = compose_leniently([o for o in overrides if not o.lstrip("+~").startswith(key)])
    known = _keys(config)
    if key.startswith("hydra."):
        known = [f"hydra.launcher.{name}" for name in config.hydra.launcher if name != "_target_"]
        siblings = _siblings(key.rpartition(".")[0], known)
        return f"{key}: Hydra has no such key" + (f". {siblings}" if siblings else "")
    groups = [str(group) for group in config.hydra.runtime.choices if "/" not in str(group)]
    parent, _, name = key.rpartition(".")
    if parent == "tracking.tags":
        return f"{key}: there is no such tag yet. To add it: +{key}=VALUE"
    near = [n for n in known + groups if _may_be_meant(n, key)]
    message = f"{key}: there is no such key. {did_you_mean(key, near)}"
    if siblings := _siblings(parent, known):
        message += siblings
        if parent.split(".")[0] in OPEN_PARTS:
            message += f". To pass {name} to the target all the same: +{key}=VALUE"
        return message
    top = {*groups, *(name.split(".")[0] for name in known)}
    return f"{message}The keys and groups are: {', '.join(sorted(top))}"


def _may_be_meant(known: str, key: str) -> bool:
    """Return whether a known key may be what was meant by one that is not there.

    It is no part that holds the key, and beside the key it has a name like its own.
    """
    parent, _, name = key.rpartition(".")
    other_parent, _, other_name = known.rpartition(".")
    if parent and other_parent == parent:
        return name in other_name or bool(did_you_mean(name, [other_name]))
    return not key.startswith(f"{known}.")


def _keys(config: DictConfig) -> list[str]:
    """Return the dotted keys of a composed config, without Hydra's own."""
    kept = [str(key) for key in config if key != "hydra"]
    return [name for name, _ in leaves(OmegaConf.masked_copy(config, kept))]


def _siblings(parent: str, known: Sequence[str]) -> str:
    """Return the names beside a key, as in "optimizer has: lr, momentum"; '' if there are none."""
    inside = [k.removeprefix(parent + ".") for k in known if parent and k.startswith(parent + ".")]
    names = dict.fromkeys(name.split(".")[0] for name in inside)
    return f"{parent} has: {', '.join(names)}" if names else ""
