"""The commands for the records of runs, from words to lines: notes and tags."""

import argparse
import re
from collections.abc import Sequence

from mnist_exp import api
from mnist_exp.cli.command import argument, command, command_line
from mnist_exp.errors import ConfigError


@command(
    "RUN [TEXT]",
    "gives a run or a sweep a note, or prints it",
    argument("run", metavar="RUN_OR_SWEEP", help="an id, its beginning, last, a folder"),
    argument(
        "words",
        nargs="*",
        metavar="TEXT",
        help="the note, in quotes; '' removes it, and without it the note is printed. And "
        "tracking.uri=...",
    ),
    example="note last 'the first one without warm-up'",
)
def note(args: argparse.Namespace) -> int:
    """Set the note of a run, or print it."""
    overrides = _overrides(args.words)
    texts = [word for word in args.words if word not in overrides]
    if len(texts) > 1:
        raise ConfigError(
            f"note: it is one text, and {len(texts)} were given. Put it in quotes: "
            f"{command_line('note', args.run, ' '.join(texts))}"
        )
    changed = api.note(args.run, texts[0] if texts else None, overrides)
    print(changed.note if not texts else f"run {changed.id}  {changed.name}")
    _tell_if_waiting(changed.waits)
    return 0


@command(
    "RUN [KEY=VALUE ...]",
    "gives a run or a sweep tags, or prints them",
    argument("run", metavar="RUN_OR_SWEEP", help="an id, its beginning, last, a folder"),
    argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="tags; without any, those that were given are printed. And tracking.uri=...",
    ),
    example="tag last team=vision 'stage=to be published'",
)
def tag(args: argparse.Namespace) -> int:
    """Set tags of a run, and print those that it has."""
    overrides = _overrides(args.words)
    tags = _tags([word for word in args.words if word not in overrides])
    changed = api.tag(args.run, tags, overrides)
    if tags:
        print(f"run {changed.id}  {changed.name}")
    for key, value in sorted(changed.tags.items()):
        print(f"{key}={value}")
    _tell_if_waiting(changed.waits)
    return 0


def _overrides(words: Sequence[str]) -> list[str]:
    """Return the overrides among words: no run, note or tag begins like one."""
    return [word for word in words if re.match(r"tracking\.uri=", word)]


def _tags(words: Sequence[str]) -> dict[str, str]:
    """Return the tags of words `key=value`. Raise ConfigError for a word that is none."""
    tags = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"{word!r}: a tag is key=value, as in team=vision; quote it if it has spaces"
            )
        tags[key] = value
    return tags


def _tell_if_waiting(reason: str) -> None:
    if reason:
        print(f"MLflow does not have it yet ({reason}). To bring it there: {command_line('sync')}")
