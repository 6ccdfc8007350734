"""What MLflow takes as a name or a value, so that what it would refuse is told before a start."""

import posixpath
import re

KEY_LENGTH = 250  # characters of the name of a parameter, a metric or a tag
TAG_LENGTH = 8000  # of a tag's value
PARAM_LENGTH = 6000  # of a parameter's value
RUN_NAME_LENGTH = 250  # of a run's name, in a database
EXPERIMENT_LENGTH = 256  # of an experiment's name, in a database
SHOWN = 60  # of a long name in a message


def key_problem(key: str) -> str:
    """Return why MLflow would refuse a name of a parameter, a metric or a tag, or ""."""
    if len(key) > KEY_LENGTH:
        return f"its name has {len(key)} characters, and MLflow takes {KEY_LENGTH} at most"
    if not re.fullmatch(r"[/\w.\- :]+", key):
        return "a name may have letters, digits, spaces and the signs / _ - . : alone, for MLflow"
    if posixpath.normpath(key) != key or key == "." or key.startswith(("/", "..")):
        return "its name would lead elsewhere as a path, which MLflow refuses"
    return ""


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
