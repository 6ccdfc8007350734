"""What MLflow takes as a name or a value, so that what it would refuse is told before a start.

And the names of tags that are recorded of every run, so that nobody can give them.
"""

import posixpath
import re

from mnist_exp.errors import ConfigError

KEY_LENGTH = 250  # characters of the name of a parameter, a metric or a tag
TAG_LENGTH = 8000  # of a tag's value
PARAM_LENGTH = 6000  # of a parameter's value
RUN_NAME_LENGTH = 250  # of a run's name, in a database
EXPERIMENT_LENGTH = 256  # of an experiment's name, in a database
SHOWN = 60  # of a long name in a message
RESERVED_TAGS = frozenset({
    *("command_line", "git_dirty", "device", "threads", "cpu", "gpu", "compiled", "stack_size"),
    *("model", "dataset", "optimizer", "overrides", "config_hash", "choices", "output_dir"),
    *("first_losses", "stopped", "reason", "run_key", "job", "swept", "sweep", "launcher"),
    *("chosen", "jobs", "note"),
})  # fmt: skip


def key_problem(key: str) -> str:
    """Return why MLflow would refuse a name of a parameter, a metric or a tag, or ""."""
    if len(key) > KEY_LENGTH:
        return f"its name has {len(key)} characters, and MLflow takes {KEY_LENGTH} at most"
    if not re.fullmatch(r"[/\w.\- :]+", key):
        return "a name may have letters, digits, spaces and the signs / _ - . : alone, for MLflow"
    if posixpath.normpath(key) != key or key == "." or key.startswith(("/", "..")):
        return "its name would lead elsewhere as a path, which MLflow refuses"
    return ""


def is_reserved(tag: str) -> bool:
    """Return whether a tag of this name is the program's or MLflow's own."""
    return tag in RESERVED_TAGS or tag.startswith(("mlflow.", "version."))


def check_tag(name: str, key: str, value: str) -> None:
    """Raise ConfigError for a tag that is taken, or that MLflow would refuse.

    Args:
        name: What the message calls it.
        key: Its name.
        value: Its value.
    """
    if is_reserved(key):
        raise ConfigError(
            f"{name}={shortened(value)}: a tag of this name is the program's own or MLflow's, and "
            f"cannot be given. Choose another name"
            + (", or give a note: mnist-exp note RUN TEXT" if key == "note" else "")
        )
    if problem := key_problem(key) or length_problem(value, TAG_LENGTH):
        raise ConfigError(f"{name}={shortened(value)}: {problem}")


def length_problem(text: str, limit: int) -> str:
    """Return why a text is too long for MLflow, or ""."""
    if len(text) <= limit:
        return ""
    return f"it has {len(text)} characters, and MLflow takes {limit} at most"


def shortened(text: str, length: int = SHOWN) -> str:
    """Return a text, cut to a length where it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def storable(value: object, limit: int) -> str:
    """Return the text of a value as any store takes it: not too long, and in Unicode."""
    # half of a surrogate pair is what Python makes of a file's name that is not UTF-8
    return str(value).encode(errors="backslashreplace").decode()[:limit]
