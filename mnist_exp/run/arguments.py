"""The arguments in a node of a config, checked against the signature of what takes them."""

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from torch import Tensor

from mnist_exp.errors import ConfigError, did_you_mean
from mnist_exp.formatting import as_typed, is_number

_LISTS = (tuple, list, Sequence, Iterable, Collection, set, frozenset)  # that a list is given to
_Plain = tuple[str, Callable[[Any], bool]]  # a type in words, and its check
_PLAIN: dict[Any, _Plain] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: is_number(value) and isinstance(value, int)),
    float: ("a number", is_number),
    str: ("text", lambda value: isinstance(value, str)),
    types.NoneType: ("null", lambda value: value is None),
}


def check_arguments(
    key: str, target: Any, node: Mapping[str, Any], added: Sequence[str] = ()
) -> None:
    """Check the arguments in a node against the signature of its target.

    Args:
        key: The dotted key of the node, for messages.
        target: A class.
        node: A part of a config; keys that begin with an underscore are no arguments.
        added: Names of the arguments that are added to those of the config.

    Raises:
        ConfigError: An argument is unknown, missing, or of another type than the signature tells.
    """
    parameters = _signature(target).parameters
    name = f"{target.__module__}.{target.__qualname__}"
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument, value in node.items():
        if argument in parameters:
            _check_value(f"{key}.{argument}", value, parameters[argument])
        elif not argument.startswith("_") and not takes_any:
            known = [n for n in parameters if n not in added]
            raise ConfigError(
                f"{key}.{argument}: {name} takes no such argument. "
                f"{did_you_mean(argument, known)}It takes: {', '.join(known) or 'none'}. "
                f"To drop it: '~{key}.{argument}'"
            )
    if "_args_" in node:
        if not _is_list(node["_args_"]):
            raise ConfigError(f"{key}._args_={as_typed(node['_args_'])}: must be a list")
        positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for i, (value, parameter) in enumerate(zip(node["_args_"], positional, strict=False)):
            _check_value(f"{key}._args_.{i}", value, parameter)
        return
    for argument, p in parameters.items():
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if needed and argument not in node and argument not in added:
            raise ConfigError(f"{key}.{argument}: {name} needs it. Add +{key}.{argument}=VALUE")


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except Exception:  # an annotation can be any text
        return inspect.signature(target)


def _check_value(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raise ConfigError for a value that a parameter cannot take, by its type or its default."""
    default, expected = parameter.default, parameter.annotation
    if expected is parameter.empty or isinstance(expected, str):
        expected = _type_of(default)
    if _fits(value, expected) or (value is None and default is None):
        return
    message = f"{key}={as_typed(value)}: must be {_describe(expected)}"
    if default is not parameter.empty and default is not None:
        message += f", as its default {as_typed(default)}"
    raise ConfigError(message)


def _type_of(default: Any) -> Any:
    """Return the type that a parameter without annotation seems to have."""
    if is_number(default):
        return float | None
    if isinstance(default, tuple | list) and default and all(map(is_number, default)):
        return Sequence[float]
    return type(default) if isinstance(default, bool | str) else Any


def _fits(value: Any, expected: Any) -> bool:
    """Return whether a value of a config may be of an expected type, as far as that tells."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True  # it is built before
    if plain := _plain(expected):
        return plain[1](value)
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple and parts and parts[-1] is not ...:
        return _is_list(value) and len(value) == len(parts) and all(map(_fits, value, parts))
    if (origin or expected) in _LISTS:
        return _is_list(value) and all(_fits(item, part) for item in value for part in parts[:1])
    return expected is not Tensor  # which no config can hold; of another type nothing is known


def _plain(expected: Any) -> _Plain | None:
    # annotations are not always hashable
    return next((plain for kind, plain in _PLAIN.items() if kind is expected), None)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _describe(expected: Any) -> str:
    """Return an expected type in words."""
    if plain := _plain(expected):
        return plain[0]
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in parts if part is not Tensor))
    if origin is Literal:
        return ", ".join(map(str, parts))
    if (origin or expected) not in _LISTS:
        return f"a {getattr(expected, '__name__', expected)}"
    kinds = {_describe(part) for part in parts if part is not ...}
    plural = {"a number": "numbers", "a whole number": "whole numbers", "text": "texts"}
    items = plural.get(kinds.pop(), "values") if len(kinds) == 1 else "values"
    count = f"{len(parts)} " if origin is tuple and ... not in parts else ""
    return f"a list of {count}{items}"
