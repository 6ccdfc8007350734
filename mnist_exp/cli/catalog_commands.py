"""The commands for all runs on record, from words to lines."""

import argparse
import json
import re
import sys
from collections.abc import Sequence

from mnist_exp import api
from mnist_exp.cli.command import (
    argument,
    check_figure,
    command,
    command_line,
    divide,
    path,
    save_figures,
)
from mnist_exp.errors import ConfigError

LINES = 20  # of a table, unless more are asked for


@command(
    "[SWEEP] [FILTER ...]",
    "lists runs and sweeps, the newest first",
    argument(
        "words",
        nargs="*",
        metavar="SWEEP_OR_FILTER",
        help="a sweep, to list its runs; conditions, as in 'optimizer.lr>0.05 and model=cnn'; "
        "and tracking.uri=...",
    ),
    argument("--filter", "-f", action="append", default=[], metavar="FILTER", help="a condition"),
    argument(
        "--sort",
        default="-started",
        metavar="FIELD",
        help="the order; with a minus, the greatest first (the default is -started)",
    ),
    argument(
        "--limit",
        "-n",
        type=int,
        metavar="N",
        help=f"the most lines ({LINES} of a table, unless a sweep is named; otherwise all)",
    ),
    argument("--all", "-a", action="store_true", help="every run, those of sweeps as well"),
    argument("--json", action="store_true", help="print JSON, with all fields"),
    argument("--csv", action="store_true", help="print CSV, with all fields"),
    example="runs 'optimizer.lr>0.05 and model=cnn' --sort=-val/accuracy",
)
def runs(args: argparse.Namespace) -> int:
    """Print a line for each run or sweep."""
    from datetime import datetime

    from mnist_exp.run.console import Terminal

    sweep, filters, overrides = _divide(args.words)
    if args.json and args.csv:
        raise ConfigError("--json --csv: only one of them can be printed")
    is_table = not (args.json or args.csv or args.all or sweep)
    found = api.list_records(
        sweep,
        [*filters, *args.filter],
        overrides,
        sort=args.sort,
        limit=LINES if args.limit is None and is_table else args.limit,
        unfolded=args.all,
    )
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
    elif args.csv:
        print(found.csv_text(), end="")
    elif not found.records and filters + args.filter:
        print(f"no run is like that. All of them: {command_line('runs', '--all')}")
    elif not found.records:
        print(f"there are no runs yet. To make one: {command_line('train')}")
    else:
        flexible = ("name", "status", "differs in", "note")
        Terminal().table("", *found.table(datetime.now()), cut=flexible)
        if len(found.records) < found.total:
            print(f"{len(found.records)} of {found.total}. More: --limit {found.total}")
    return 0


@command(
    "A B [C ...]",
    "puts runs, or cells of sweeps, beside each other: what differs",
    argument(
        "words",
        nargs="*",
        metavar="RUN_OR_SWEEP",
        help="two runs or more; or two or more of SWEEP (its chosen cell), SWEEP:2 (the second of "
        "its leaderboard) and SWEEP:lr=0.1,batch_size=32; and tracking.uri=...",
    ),
    argument(
        "--figure", type=path, metavar="FILE", help="draw the curves: a .png, .svg or .pdf file"
    ),
    argument("--json", action="store_true", help="print JSON instead of tables"),
    example="compare last:1 last:2 --figure curves.png",
)
def compare(args: argparse.Namespace) -> int:
    """Print what differs between runs or cells, and tests of the difference."""
    from mnist_exp.run.console import reporting

    check_figure("--figure", args.figure)
    overrides, words = divide(args.words)
    with reporting(announcement=f"comparing {' and '.join(words)} ...") as terminal:
        found = api.compare(words, overrides)
        if args.figure is not None:
            save_figures("--figure", args.figure, {args.figure: found.draw()})
    if args.figure is not None:
        print(f"figure {args.figure.resolve()}", file=sys.stderr)
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
        return 0
    for title in found.titles():
        terminal.line(title)
    for title, table in found.tables():
        terminal.line("")
        terminal.table(title, *table)
    for line in found.lines():
        terminal.line(line)
    for run_id in found.to_evaluate:
        typed = command_line("evaluate", run_id[:8], *overrides)
        terminal.line(f"to keep the predictions: {typed}")
    return 0


def _divide(words: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Return the sweep, the filters and the overrides among words."""
    overrides, others = divide(words)
    filters = [word for word in others if re.search(r"[=<>~]", word)]
    sweeps = [word for word in others if word not in filters]
    if len(sweeps) > 1:
        raise ConfigError(
            f"{' '.join(map(repr, sweeps))}: one sweep can be named. A condition compares a field, "
            f"as in 'optimizer.lr>0.05'"
        )
    return (sweeps[0] if sweeps else None), filters, overrides
