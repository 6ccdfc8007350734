"""The commands for runs while they are trained, and when they are of no more use."""

import argparse
import json
import sys
from typing import Any, Protocol

from mnist_exp import api
from mnist_exp.cli.command import argument, command, command_line, divide, overrides
from mnist_exp.errors import ConfigError

_YES = argument("--yes", "-y", action="store_true", help="remove it without asking")
_PLAN_AS_JSON = argument(
    "--json", action="store_true", help="print JSON, and remove nothing unless there is --yes"
)


@command(
    "[SWEEP]",
    "what is being trained now, and how far it is",
    argument(
        "sweep",
        nargs="?",
        metavar="SWEEP",
        help="show the jobs of this sweep that run now",
    ),
    argument("--json", action="store_true", help="print JSON, with the jobs of sweeps"),
    example="status last",
)
def status(args: argparse.Namespace) -> int:
    """Print a line for each run or sweep that a process is at work on."""
    from mnist_exp.run.console import Terminal

    found = api.status(args.sweep)
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
    elif not found.activities:
        print(f"nothing is being trained. What was: {command_line('runs')}")
    else:
        Terminal().table("", *found.table(), cut=("name", "process"))
    return 0


@command(
    "RUN_OR_SWEEP",
    "ends a run or a sweep with a checkpoint, from any terminal",
    argument(
        "run",
        metavar="RUN_OR_SWEEP",
        help="an id, its beginning, a folder, or last: the newest that runs",
    ),
    overrides(),
    argument("--json", action="store_true", help="print JSON"),
    example="stop last",
)
def stop(args: argparse.Namespace) -> int:
    """Ask a run or a sweep to end, and print how it has ended and how to go on."""
    from mnist_exp.run.console import reporting

    with reporting(announcement=f"{args.run}: asking it to end, and waiting for that ..."):
        stopped = api.stop(args.run, args.overrides)
    if args.json:
        print(json.dumps(stopped.as_json(), indent=1))
        return 0
    record, history = stopped.record, stopped.history
    reason = f": {history.reason}" if history.reason else ""
    print(f"{record.kind} {stopped.id[:8]}  {record.name} is {history.status}{reason}")
    if history.status != "FINISHED":
        print(f"to go on with it: {command_line('resume', stopped.id[:8], store=history.uri)}")
    return 0


@command(
    "RUN_OR_SWEEP ...",
    "removes runs and sweeps for good, with all their files",
    argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_SWEEP",
        help="ids, beginnings of ids, last or folders; and tracking.uri=...",
    ),
    _YES,
    _PLAN_AS_JSON,
    example="rm 7ba6b5ac 316bf4d7",
)
def rm(args: argparse.Namespace) -> int:
    """Print what would go, ask, and remove it."""
    typed, runs = divide(args.runs)
    if not runs:
        raise ConfigError("RUN_OR_SWEEP: none is given. To remove one: mnist-exp rm RUN_OR_SWEEP")
    _carry_out(api.plan_removal(runs, typed), args, "removing", "removed")
    return 0


@command(
    "[OVERRIDE ...]",
    "clears deleted runs, folders without a run, leftovers",
    overrides(),
    argument("--dry-run", action="store_true", help="only print what would go"),
    argument(
        "--checkpoints",
        action="store_true",
        help="also the checkpoints of finished runs; the trained models stay",
    ),
    _YES,
    _PLAN_AS_JSON,
    example="gc --dry-run",
)
def gc(args: argparse.Namespace) -> int:
    """Print what would go and what is kept, ask, and clear it."""
    from mnist_exp.run.console import reporting

    with reporting(announcement="looking for what is of no more use ..."):
        plan = api.plan_gc(args.overrides, checkpoints=args.checkpoints)
    if plan.is_empty and not args.json:
        print("\n".join([*plan.lines()[:-1], "nothing to clear"]))
        return 0
    _carry_out(plan, args, "clearing", "cleared", is_dry_run=args.dry_run)
    return 0


class _Plan(Protocol):
    def as_json(self) -> Any: ...
    def lines(self) -> Any: ...
    def carry_out(self) -> None: ...


def _carry_out(
    plan: _Plan,
    args: argparse.Namespace,
    doing: str,
    done: str,
    is_dry_run: bool = False,
) -> None:
    """Print a plan and carry it out, if that is agreed to; with --json, only by --yes."""
    from mnist_exp.run.console import reporting

    if args.json:
        print(json.dumps(plan.as_json(), indent=1))
        if args.yes and not is_dry_run:
            plan.carry_out()
        return
    print("\n".join(plan.lines()))
    if is_dry_run or not _confirmed(args.yes):
        return
    with reporting(announcement=f"{doing} ..."):
        plan.carry_out()
    print(done)


def _confirmed(yes: bool) -> bool:
    """Ask, unless by --yes, and return whether a person agrees. Raise ConfigError if none can."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError(
            "nothing is removed, as there is no terminal to ask in. To remove it all the same, "
            "type the same with --yes"
        )
    print("Remove all this for good? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("nothing is removed")
    return False
