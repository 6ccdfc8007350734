"""The names that tell runs apart in a list."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a list of runs needs the names alone
    from mnist_exp.config.schema import Config

# the keys and groups whose values are in a run's name already
KEYS_IN_NAME = ("dataset", "dataset.name", "model", "model.hidden", "optimizer", "optimizer.lr",
                "schedule", "training.batch_size", "seed")  # fmt: skip


def run_name(config: "Config", choices: Mapping[Any, Any]) -> str:
    """Return the name of a run: the chosen one, or "mlp-64-32 sgd lr=0.1 bs=64 seed=0".

    Args:
        config: The config of the run.
        choices: The option of each group.
    """
    if config.tracking.run_name:
        return config.tracking.run_name
    hidden = config.model.get("hidden", [])
    layers = hidden if isinstance(hidden, list) else [hidden]
    model = "-".join([str(choices.get("model") or "model"), *map(str, layers)])
    parts = [model, str(choices.get("optimizer") or "optimizer")]
    if config.dataset.name != "mnist":
        parts.insert(0, config.dataset.name)
    if choices.get("schedule") not in (None, "constant"):
        parts.append(str(choices["schedule"]))
    if "lr" in config.optimizer:
        parts.append(f"lr={config.optimizer['lr']:g}")
    return " ".join([*parts, f"bs={config.training.batch_size}", f"seed={config.seed}"])


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or all of it where two would be the same.

    `seed` stays for the run's own, whether or not it is among the keys.
    """
    last = {key: key.rpartition(".")[2] for key in keys}
    taken = Counter((last | {"seed": "seed"}).values())
    return {key: name if taken[name] == 1 else key for key, name in last.items()}
