"""What a command is: its name, its arguments, its function; and what several of them share."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_exp import api
from mnist_exp.errors import ConfigError

STORE_VARIABLE = "MLFLOW_TRACKING_URI"  # which counts before all that is typed

Argument = tuple[tuple[str, ...], dict[str, Any]]  # of argparse's add_argument
Function = Callable[[argparse.Namespace], int]  # runs a command and returns the exit status


@dataclass(frozen=True)
class Command:
    """A command of the program, with its arguments and the function that runs it."""

    name: str
    usage: str  # the arguments, for the list of commands
    summary: str
    arguments: Sequence[Argument]
    function: Function
    example: str = ""  # what to type, behind the name of the program

    @property
    def module(self) -> str:
        """The name of the module that has its function."""
        return self.function.__module__

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of the words behind its name."""
        parser = argparse.ArgumentParser(
            prog=f"mnist-exp {self.name}",
            description=self.summary,
            epilog=f"example: mnist-exp {self.example}" if self.example else None,
            allow_abbrev=False,
        )
        for names, options in self.arguments:
            parser.add_argument(*names, **options)
        return parser

    def run(self, words: Sequence[str]) -> int:
        """Run the command on the words behind its name, and return the exit status."""
        return self.function(self.parser().parse_intermixed_args(words))


COMMANDS: dict[str, Command] = {}


def command(
    usage: str, summary: str, *arguments: Argument, example: str = ""
) -> Callable[[Function], Function]:
    """Register the decorated function as the command of its name. See `Command`."""

    def register(function: Function) -> Function:
        name = function.__name__
        COMMANDS[name] = Command(name, usage, summary, arguments, function, example)
        return function

    return register


def argument(*names: str, **options: Any) -> Argument:
    """Return the arguments of a call of argparse's add_argument."""
    return names, options


def overrides(examples: str = "tracking.uri=...") -> Argument:
    """Return the argument for overrides; its default tells argparse that none are needed."""
    return argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=examples)


def divide(
    words: Sequence[str], keys: tuple[str, ...] = ("tracking.uri=",)
) -> tuple[list[str], list[str]]:
    """Return the overrides among words, which begin with one of the keys, and the other words."""
    typed = [word for word in words if word.startswith(keys)]
    return typed, [word for word in words if word not in typed]


def path(text: str) -> Path:
    """Return a path that was typed, and refuse an empty one, which Path takes for this folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: a file or a folder has to be named")
    return Path(text)


RUN = argument("run", metavar="RUN", help="a run id, its beginning, or last")
STORE_AND_DATA = overrides("tracking.uri=..., and dataset.root=FOLDER where the data has moved")
TTA = argument(
    "--tta",
    action="store_true",
    help="test-time augmentation: average the probabilities over an image and its shifts by one "
    "pixel to the left, right, up and down, and over mirror images if it was trained on such",
)
# The formats are those of figures/style.py, whose import takes half a second.
FORMATS = ("png", "svg", "pdf")
FORMAT = argument("--format", choices=FORMATS, default="png", help="of the figures written")


def command_line(*words: str, store: str | None = None) -> str:
    """Return what to type here to run a command of this program, on a store if one is given."""
    program = Path(sys.argv[0])
    on_path = shutil.which("mnist-exp")
    if program.name == "__main__.py":
        typed = [sys.executable, "-m", "mnist_exp"]
    elif on_path and Path(on_path).resolve() == program.resolve():
        typed = ["mnist-exp"]
    else:
        typed = [str(program)]
    if store is None or store == api.default_store():
        return shlex.join([*typed, *words])
    if os.environ.get(STORE_VARIABLE):
        return shlex.join([f"{STORE_VARIABLE}={store}", *typed, *words])
    return shlex.join([*typed, *words, f"tracking.uri={store}"])


def check_figure(option: str, file: Path | None) -> None:
    """Raise ConfigError, before the work, if the figure could not be written after it."""
    if file is not None and file.suffix.lower().removeprefix(".") not in FORMATS:
        raise ConfigError(f"{option} {file}: must end in .png, .svg or .pdf")
    check_writable(option, file, is_folder=False)


def check_writable(option: str, place: Path | None, *, is_folder: bool = True) -> None:
    """Raise ConfigError, before the work, if what an option names could not be written after it."""
    if place is None:
        return

    from mnist_exp.system import files

    with files.reporting_write_errors(option, place):
        if is_folder:
            files.check_writable_folder(place)
        else:
            files.check_writable_file(place)


def save_figures(option: str, place: Path, figures: Mapping[Path, Any]) -> None:
    """Write figures to their files. Raise ConfigError, naming an option's value, if that fails."""
    from mnist_exp.system import files

    with files.reporting_write_errors(option, place):
        for file, figure in figures.items():
            api.save_figure(figure, file)
