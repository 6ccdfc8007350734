"""The overrides that a word which is being typed can become: for completion with TAB."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from mnist_exp.config.hydra_adapter import compose_leniently, hydra_words
from mnist_exp.config.schema import leaves, values_of


def candidates(
    word: str, others: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> list[str]:
    """Return what an override that is being typed can become.

    Of a key, these are not all that follow but the next part of each; of a value, all that are
    known: a group's options, one of a few names, or else the one that the config has.

    Args:
        word: What is typed of it.
        others: The other overrides.
        config_name: The config file to start from.
        config_dir: One more folder of config groups.

    Raises:
        COMPOSITION_ERRORS: One of these, where there is no such config.
    """
    typed = word.lstrip("+~")
    sign = word.removesuffix(typed)
    context, config = compose_leniently(others, config_name, config_dir)
    groups = [str(group) for group in config.hydra.runtime.choices]
    keys = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    key, equals, value = typed.partition("=")
    if equals:
        swept = value[: value.rfind(",") + 1]  # all but the last of several
        known = _values(key, keys.get(key))
        if key in groups:
            loader, words = context.config_loader, hydra_words([], config_dir)
            known = loader.get_group_options(key, ObjectType.CONFIG, config_name, words)
        return [f"{sign}{key}={swept}{v}" for v in known if v not in swept.split(",")]
    end = "" if sign == "~" else "="
    return sorted(sign + name for name in _next_parts([*groups, *keys], typed, end))


def _next_parts(names: Sequence[str], typed: str, end: str) -> Collection[str]:
    """Return the names that begin with what is typed, up to their next part.

    A part that is the only one is gone through, as a shell would put a blank behind it.
    """
    parts = set()
    for name in names:
        if name.startswith(typed):
            separator = re.compile("[./]").search(name, len(typed))
            parts.add(name[: separator.end()] if separator else name + end)
    if len(parts) == 1 and (only := next(iter(parts))).endswith((".", "/")):
        return _next_parts(names, only, end)
    return parts


def _values(key: str, value: Any) -> Sequence[str]:
    if names := values_of(key):
        return names
    if isinstance(value, bool):
        return ["true", "false"]
    return [str(value)] if re.fullmatch(r"[\w.+-]+", str(value)) and value is not None else []
