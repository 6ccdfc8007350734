"""The commands for the records of runs, from words to lines: tables, models, notes, tags."""

import argparse
from collections.abc import Sequence

from mnist_exp import api
from mnist_exp.cli.command import argument, command, command_line, divide, path
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import printable_lines


@command(
    "[RUN ...] --to FILE",
    "writes the metrics of runs as a table, or the model of one as ONNX",
    argument(
        "words",
        nargs="*",
        metavar="RUN_OR_SWEEP",
        help="runs, and sweeps with their jobs; without any, all. And tracking.uri=... (from a "
        "server it is slow: a call for each metric of each run); of a model dataset.root=FOLDER",
    ),
    argument(
        "--to",
        type=path,
        metavar="FILE",
        help="NAME.csv or NAME.parquet, which hold the metrics (run, key, step, time, value), the "
        "runs being in NAME.runs.csv beside it; NAME.json, which holds both; NAME.onnx, which "
        "holds the model of one run, compared with torch on the test set",
    ),
    argument(
        "--filter",
        "-f",
        action="append",
        default=[],
        metavar="FILTER",
        help="a condition for the runs, as for mnist-exp runs",
    ),
    argument("--force", action="store_true", help="replace a file that exists"),
    example="export last --to numbers.csv",
)
def export(args: argparse.Namespace) -> int:
    """Write tables, or a model, and print where they are."""
    from mnist_exp.run.console import reporting

    if args.to is None:
        raise ConfigError("--to FILE is missing, as in mnist-exp export last --to numbers.csv")
    overrides, words = divide(args.words, ("tracking.uri=", "dataset.root="))
    what = "the model" if args.to.suffix.lower() == ".onnx" else "the tables"
    with reporting(announcement=f"{what} for {args.to}: reading the record ..."):
        written = api.export(args.to, words, args.filter, overrides, force=args.force)
    print("\n".join(written.lines()))
    return 0


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
    overrides, texts = divide(args.words)
    if len(texts) > 1:
        raise ConfigError(
            f"note: it is one text, and {len(texts)} were given. Put it in quotes: "
            f"{command_line('note', args.run, ' '.join(texts))}"
        )
    changed = api.note(args.run, texts[0] if texts else None, overrides)
    print(printable_lines(changed.note) if not texts else f"run {changed.id}  {changed.name}")
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
    overrides, words = divide(args.words)
    tags = _tags(words)
    changed = api.tag(args.run, tags, overrides)
    if tags:
        print(f"run {changed.id}  {changed.name}")
    for key, value in sorted(changed.tags.items()):
        print(f"{key}={printable_lines(value)}")
    _tell_if_waiting(changed.waits)
    return 0


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
