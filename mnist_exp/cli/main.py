"""The command line: `mnist-exp COMMAND`. A thin layer that imports nothing heavy before it must."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mnist_exp import __version__, api
from mnist_exp.cli import catalog_commands, commands, lifecycle_commands, record_commands
from mnist_exp.cli.command import COMMANDS, command_line
from mnist_exp.errors import BROKEN_PIPE, ConfigError, RunFailed, Terminated, did_you_mean
from mnist_exp.system import garbage, signals, streams

# Their import has registered all commands; a person reads of them in this order.
MODULES = (commands, catalog_commands, lifecycle_commands, record_commands)

_HELP = """\
usage: mnist-exp COMMAND [ARGUMENT ...]

{commands}

RUN is an MLflow run id, the beginning of one, or last; SWEEP is that of a sweep's parent run;
FOLDER is the output of a run or a sweep.
An OVERRIDE is key=value or group=option.

  mnist-exp train experiments=seed_mlp
  mnist-exp train model=cnn optimizer=adamw optimizer.lr=3e-3 training.epochs=3
  mnist-exp train -m optimizer.lr=0.01,0.1 seed=0,1,2
  mnist-exp report last
  mnist-exp COMMAND --help  more of a command
"""


def program() -> NoReturn:
    """Run `main` as a process of its own.

    Once all is written, the process ends at once: where torch and mlflow are loaded, Python's
    clearing up before it ends takes one to three seconds.
    """
    status = 1  # of an exception that main() lets pass, whose traceback Python has printed
    output = streams.replace_standard_streams()

    def exit_now() -> None:
        streams.flush()
        os._exit(status)

    garbage.collect_rarely()
    atexit.register(exit_now)  # called after all that will be registered from here on
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        if not streams.flush() and not status:
            status = BROKEN_PIPE
        if output.problem and not status:
            _print_error(f"the output cannot be written: {output.problem}")
            status = 1
        signals.ignore()  # all is written, and the status is known
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    The exit status is 0 where all is well, 1 where a run failed, 2 for a bad command, 130, 143 or
    129 after a signal, and 141 where nobody reads the output.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    signals.handle()
    logging.basicConfig(format="mnist-exp: %(message)s")
    logging.getLogger("mnist_exp").setLevel(logging.INFO)
    try:
        status = _run(words)
        sys.stdout.flush()
        sys.exit(status)
    except (ConfigError, RunFailed) as error:
        if full_error:
            import traceback

            traceback.print_exc()
        _print_error(str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except (KeyboardInterrupt, Terminated) as ended:
        status = int(ended.code or 1) if isinstance(ended, Terminated) else 130
        text = "terminated" if isinstance(ended, Terminated) else "interrupted"
        text = "ended, as nobody reads the output" if status == BROKEN_PIPE else text
        if folders := getattr(ended, "__notes__", []):
            text += f". To go on with it:\n{command_line('resume', folders[0])}"
        elif status == BROKEN_PIPE:
            sys.exit(status)  # as below: no run was ended by it
        _print_error(text)
        sys.exit(status)
    except BrokenPipeError:  # nobody reads the last lines, as after `| head`
        sys.exit(BROKEN_PIPE)
    except OSError as error:  # of a disk that is full or read-only, where nothing can be begun
        if full_error:
            raise
        _print_error(str(error))
        sys.exit(1)


def _print_error(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"mnist-exp: {text}", file=sys.stderr)


def _run(words: Sequence[str]) -> int:
    """Run what is typed behind `mnist-exp`, and return the exit status."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks while somebody types
        from mnist_exp.cli.completion import complete

        complete()
    if not words or words[0] in ("-h", "--help", "help"):
        ordered = [c for m in MODULES for c in COMMANDS.values() if c.module == m.__name__]
        lines = [f"  {f'{c.name} {c.usage}':26} {c.summary}" for c in ordered]
        print(_HELP.format(commands="\n".join(lines)), end="")
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"mnist-exp {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"{name}: there is no such command. {did_you_mean(name, COMMANDS)}"
            f"Commands: {', '.join(COMMANDS)}"
        )
    if name != "completion":  # which starts with every shell
        for folder, reason in api.mark_dead_runs().items():
            _print_error(
                f"the run in {folder} is KILLED: {reason}. To go on with it: "
                f"{command_line('resume', str(folder))}"
            )
    return commands.run(name, rest)
