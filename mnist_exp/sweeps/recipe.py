"""A run's config as a recipe, which names the options of its groups and all values."""

from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from mnist_exp.config.compose import compose
from mnist_exp.config.schema import leaves
from mnist_exp.errors import ConfigError

GROUPS = ("dataset", "model", "optimizer", "schedule")  # that a recipe chooses in


def recipe(config: DictConfig, choices: Mapping[str, str | None], comment: str) -> str:
    """Return the text of a recipe that composes to exactly `config`, `tracking` aside.

    Args:
        config: The config of a run, resolved.
        choices: The option of each group, as the run had it.
        comment: What stands above it.
    """
    printable = "".join(c if c.isprintable() else " " for c in comment)  # as YAML wants it
    options = _options(config, choices)
    defaults = [{f"override /{group}": options[group]} for group in GROUPS]
    values = OmegaConf.masked_copy(config, [str(key) for key in config if key != "tracking"])
    parts = (OmegaConf.to_yaml({"defaults": defaults}), OmegaConf.to_yaml(values))
    return f"# @package _global_\n# {printable}\n" + "\n".join(parts)


def _options(config: DictConfig, choices: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the options of a recipe's groups.

    None where there is no option, or where it would bring back a key that the run had deleted.
    """
    options = {group: choices.get(group) for group in GROUPS}
    try:
        composed = compose([f"{group}={option}" for group, option in options.items() if option])
    except ConfigError:  # of a --config-dir, or of other code than today's
        return dict.fromkeys(GROUPS)
    for group in GROUPS:
        if not {key for key, _ in leaves(composed[group])} <= {k for k, _ in leaves(config[group])}:
            options[group] = None
    return options
