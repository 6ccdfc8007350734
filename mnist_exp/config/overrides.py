"""What overrides say that can be known without Hydra, whose import takes a third of a second."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mnist_exp.config import paths

# an address that means itself to Hydra, with single spaces in it
_PLAIN_ADDRESS = re.compile(r"tracking\.uri=([a-z]\w*:[\w./:-]+(?: [\w./:-]+)*)")


def tracking_uri(overrides: Sequence[str]) -> str | None:
    """Return what `tracking.uri` is with these overrides, None where no store is named.

    Hydra is asked only where the answer is not plain: the override has signs that may mean
    something to it, or conf/ was edited to choose a store.

    Raises:
        ConfigError: An override is at fault.
    """
    plain = [_PLAIN_ADDRESS.fullmatch(word) for word in overrides]
    if len(plain) == 1 and plain[0] is not None:
        return plain[0][1]
    if not overrides and _names_no_store():
        return None

    from mnist_exp.config.compose import compose
    from mnist_exp.config.schema import task_config
    from mnist_exp.config.validate import validate

    return validate(task_config(compose(overrides))).tracking.uri


def _names_no_store() -> bool:
    """Return whether conf/ leaves the store open, as it is when it is installed."""
    folder = paths.project_root() / "conf"
    config, tracking = _read(folder / "config.yaml"), _read(folder / "tracking" / "default.yaml")
    has_usual_group = {"tracking": "default"} in config.get("defaults", [])
    is_plain = "tracking" not in config and "defaults" not in tracking
    return has_usual_group and is_plain and tracking.get("uri", "") is None


def _read(path: Path) -> dict[str, Any]:
    """Return a YAML file of keys and values; nothing where it cannot be read, for Hydra to tell."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
