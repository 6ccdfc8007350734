"""Completion of what is typed behind `mnist-exp`, in bash, zsh and fish.

argcomplete speaks with the shells: it has their scripts, divides the line into words and quotes the
candidates. Which candidates there are is told here, from the parsers of the commands: the metavar
of an argument tells what it is. argcomplete's own reading of parsers does not know of arguments
that are left out, nor of options between them.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mnist_exp import api
from mnist_exp.cli.command import COMMANDS, Command
from mnist_exp.cli.commands import HYDRA_FLAGS
from mnist_exp.errors import ConfigError

FILES = ":files"  # the one candidate where the name of a file is to be completed
MAX_RUNS = 50  # candidates
# The metavars of runs, with the kind of run: a sweep, none, or either.
_KINDS = {"RUN": False, "SWEEP": True, "RUN_OR_SWEEP": None, "RUN_OR_FOLDER": None}
_FIELDS = ("FIELD", "FILTER", "SWEEP_OR_FILTER")  # those that begin with a field of runs

Candidates = dict[str, str]  # with their descriptions


def complete(output: TextIO | None = None) -> None:
    """Answer what argcomplete's script of a shell asks for, into its pipe, and exit."""
    from argcomplete import autocomplete

    # an option is a word like any other: no word begins with NUL
    parser = argparse.ArgumentParser(prefix_chars="\0", add_help=False)
    words: Any = parser.add_argument("words", nargs="*")
    words.completer = _complete
    autocomplete(parser, always_complete_options=False, exit_method=sys.exit, output_stream=output)


def _complete(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Candidates:
    """Return the candidates for a word that begins with `prefix`, as argcomplete asks for them."""
    words = [*_behind_the_program(parsed_args.words or []), prefix]
    with contextlib.suppress(Exception), warnings.catch_warnings():  # somebody is typing
        warnings.simplefilter("ignore")
        answer = candidates(words)
        return dict.fromkeys(_files(prefix), "") if FILES in answer else answer
    return {}


def _behind_the_program(words: Sequence[str]) -> Sequence[str]:
    """Return the words of the last command of a line, as zsh hands over all commands on it."""
    for i in reversed(range(len(words))):
        begins = i == 0 or words[i - 1].endswith((";", "&", "|"))
        if begins and Path(words[i]).name == "mnist-exp":
            return words[i + 1 :]
    return words


def _files(word: str) -> Iterator[str]:
    """Yield the files that a word can become, which may begin with KEY= or --OPTION=."""
    key, equals, text = word.rpartition("=")
    folder, name = os.path.split(text)
    for entry in sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda e: e.name):
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
            end = "/" if entry.is_dir() else ""
            yield f"{key}{equals}{os.path.join(folder, entry.name)}{end}"


def candidates(words: Sequence[str]) -> Candidates:
    """Return the candidates for the last of the words, which may be empty."""
    *before, word = words
    answer: Candidates = {}
    takes_files = False
    if not before:
        answer = {command.name: command.summary for command in COMMANDS.values()}
        if word.startswith("-"):
            answer |= {"--help": "", "--version": ""}
    elif before[0] in COMMANDS:
        answer, takes_files = _arguments(COMMANDS[before[0]], before[1:], word)
    answer = {text: help for text, help in answer.items() if text.startswith(word)}
    return answer or ({FILES: ""} if takes_files else {})


def _arguments(command: Command, before: Sequence[str], word: str) -> tuple[Candidates, bool]:
    """Return what can stand there, and whether it can be a file."""
    actions = _actions(command)
    options = {name: action for action in actions for name in action.option_strings}
    values: dict[str, str] = {}  # of the options
    others: list[str] = []
    option: argparse.Action | None = None  # whose value comes next
    for typed in before:
        if option is not None:
            values[option.dest], option = typed, None
        elif not typed.startswith("-"):
            others.append(typed)
        elif typed in options and options[typed].nargs is None:
            option = options[typed]
    if option is not None:
        return _choices(option), _takes_files(option, word)
    name, equals, _ = word.partition("=")
    if equals and name in options:
        choices = {f"{name}={value}": "" for value in _choices(options[name])}
        return choices, _takes_files(options[name], word)
    if word.startswith("-"):
        flags = [(flag, action.help) for flag, action in options.items() if flag[:2] == "--"]
        return {flag: " ".join((text or "").split()) for flag, text in flags}, False
    return _positional([a for a in actions if not a.option_strings], others, values, word)


def _positional(
    arguments: Sequence[argparse.Action], before: Sequence[str], values: dict[str, str], word: str
) -> tuple[Candidates, bool]:
    """Return the same for a word that belongs to no option, with what is typed `before` it."""
    if not arguments:
        return {}, False
    place = min(sum("=" not in typed for typed in before), len(arguments) - 1)
    if arguments[place].nargs == "?" and ("=" in word or "." in word):  # it was left out
        place += 1
    argument = arguments[place]
    overrides = [typed for typed in before if "=" in typed or typed.startswith("~")]
    if argument.metavar == "OVERRIDE":
        answer = _overrides(word, overrides, values)
    elif argument.metavar in _KINDS:
        answer = _runs(_KINDS[argument.metavar], overrides)
    elif argument.metavar == "SWEEP_OR_FILTER":
        answer = _runs(True, overrides) | _fields(overrides)
    else:
        answer = _choices(argument)
    return answer, _takes_files(argument, word)


def _choices(action: argparse.Action) -> Candidates:
    if action.metavar in _FIELDS:
        return _fields([])
    return dict.fromkeys(action.choices or (), "")


def _actions(command: Command) -> list[argparse.Action]:
    """Return the arguments of a command, and for `train` also Hydra's flags."""
    actions = command.parser()._actions
    if command.name != "train":
        return actions
    from mnist_exp.config.hydra_adapter import hydra_flags

    # -h is known already; Hydra's own completion knows nothing of what is above
    more = {*HYDRA_FLAGS} - {"--help", "-h", "--shell-completion", "-sc"}
    return actions + [a for a in hydra_flags()._actions if more & {*a.option_strings}]


def _takes_files(action: argparse.Action, word: str) -> bool:
    if action.metavar == "OVERRIDE":
        return "=" in word
    is_hydras = action.dest == "config_path"
    return is_hydras or action.metavar in ("FILE", "FOLDER", "IMAGE", "RUN_OR_FOLDER")


def _overrides(word: str, others: Sequence[str], values: dict[str, str]) -> Candidates:
    from mnist_exp.config.candidates import candidates as override_candidates

    config_name, config_dir = values.get("config_name", "config"), values.get("config_dir")
    return dict.fromkeys(override_candidates(word, others, config_name, config_dir), "")


def _fields(overrides: Sequence[str]) -> Candidates:
    try:
        return dict.fromkeys(api.field_names(overrides), "")
    except ConfigError:
        return {}


def _runs(sweeps: bool | None, overrides: Sequence[str]) -> Candidates:
    try:
        runs = api.list_runs(overrides, sweeps=sweeps)
    except ConfigError:
        return {}
    counts = Counter(run_id[:8] for run_id, _ in runs)
    short = {r[:8] if counts[r[:8]] == 1 else r: name for r, name in runs[:MAX_RUNS]}
    return {"last": "the newest", **short} if short else {}
