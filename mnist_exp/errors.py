"""The ways in which a command can end badly, as exceptions, and parts of their messages.

Everything else that is raised is a bug, and shows its traceback.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path


class ConfigError(ValueError):
    """A request that cannot be met, before anything has been created. Exit status 2.

    The message is complete: the key or file, what was found, what is allowed, what to type next.
    """


class RunFailed(RuntimeError):
    """A run was started and did not reach its end. Exit status 1.

    The message says why; the record of the run has the same reason.
    """


BROKEN_PIPE = 128 + 13  # the exit status of a program whose output nobody reads: SIGPIPE's


class Terminated(SystemExit):
    """A signal asks the program to end. Exit status 128 plus its number."""


def reason_of(error: Exception) -> str:
    """Return what a record says of why something ended."""
    return str(error) if isinstance(error, RunFailed) else f"{type(error).__name__}: {error}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean NAME? " for the known name that is nearest to a word, or ""."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {near[0]}? " if near else ""


def check_list(name: str, given: object) -> None:
    """Raise ConfigError for what is no list of texts or paths; a text is one of its letters."""
    if isinstance(given, str | Path):
        raise ConfigError(f"{name}: must be a list, as in [{given!r}], and not {given!r} itself")
    if not isinstance(given, Sequence) or not all(isinstance(item, str | Path) for item in given):
        raise ConfigError(f"{name}: must be a list of texts, and is {reprlib.repr(given)}")
