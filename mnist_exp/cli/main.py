"""The command line: `mnist-exp VERB`. A thin layer that imports nothing heavy before it must."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mnist_exp import __version__
from mnist_exp.cli.commands import VERBS, command
from mnist_exp.errors import BROKEN_PIPE, ConfigError, RunFailed, Terminated
from mnist_exp.system import signals, streams

_HELP = """\
usage: mnist-exp VERB [ARGUMENT ...]

{verbs}

RUN is an MLflow run id, the beginning of one, or last; SWEEP is that of a sweep's parent run;
FOLDER is the output of a run or a sweep.
An OVERRIDE is key=value or group=option.

  mnist-exp train experiments=seed_mlp
  mnist-exp train model=cnn optimizer=adamw optimizer.lr=3e-3 training.epochs=3
  mnist-exp train -m optimizer.lr=0.01,0.1 seed=0,1,2
  mnist-exp report last
  mnist-exp VERB --help     more of a verb
"""


def program() -> NoReturn:
    """`main` as a process of its own.

    Once all is written, the process is gone at once: where torch and mlflow are loaded, Python's
    clearing up before it ends takes one to three seconds.
    """
    status = 1  # of an exception that main() lets pass, whose traceback Python has printed
    output = streams.replace_standard_streams()

    def vanish() -> None:
        streams.flush()
        os._exit(status)

    atexit.register(vanish)  # called after all that will be registered from here on
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        if not streams.flush() and not status:
            status = BROKEN_PIPE
        if output.problem and not status:
            _say(f"the output cannot be written: {output.problem}")
            status = 1
        signals.ignore()  # all is written, and the status is known
        raise


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits: 0 well, 1 a run failed, 2 a bad command; 130, 143, 129 interrupted;
    141 nobody reads the output."""
    words = list(sys.argv[1:] if argv is None else argv)
    full_error = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    signals.handle()
    logging.basicConfig(format="mnist-exp: %(message)s")
    logging.getLogger("mnist_exp").setLevel(logging.INFO)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        sys.exit(status)
    except (ConfigError, RunFailed) as error:
        if full_error:
            import traceback

            traceback.print_exc()
        _complain(str(error), 2 if isinstance(error, ConfigError) else 1)
    except (KeyboardInterrupt, Terminated) as ended:
        status = int(ended.code or 1) if isinstance(ended, Terminated) else 130
        text = "terminated" if isinstance(ended, Terminated) else "interrupted"
        text = "ended, as nobody reads the output" if status == BROKEN_PIPE else text
        if folders := getattr(ended, "__notes__", []):
            text += f". To go on with it:\n{command('resume', folders[0])}"
        elif status == BROKEN_PIPE:
            sys.exit(status)  # as below: no run was ended by it
        _complain(text, status)
    except BrokenPipeError:  # nobody reads the last lines, as after `| head`
        sys.exit(BROKEN_PIPE)


def _complain(text: str, status: int) -> NoReturn:
    _say(text)
    sys.exit(status)


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"mnist-exp: {text}", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        lines = [f"  {f'{verb.name} {verb.usage}':25} {verb.summary}" for verb in VERBS.values()]
        print(_HELP.format(verbs="\n".join(lines)), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"mnist-exp {__version__}")
        return 0
    if words[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{words[0]}: there is no such verb. {hint}Verbs: {', '.join(VERBS)}")
    if words[0] != "completion":  # which is asked while somebody types
        _bury_the_dead()
    return VERBS[words[0]](words[1:])


def _bury_the_dead() -> None:
    """Runs whose process was killed get their true status, whichever verb comes next."""
    from mnist_exp.config.paths import output_root

    if not (output_root() / "outputs" / ".open").is_dir():  # as it is nearly always
        return
    from mnist_exp.tracking.run_log import mark_dead_runs, open_runs_at

    for folder, story in mark_dead_runs(open_runs_at(output_root())):
        if not story.parent:
            print(
                f"mnist-exp: the run in {folder} is KILLED: {story.reason}. To go on with it: "
                f"{command('resume', str(folder))}",
                file=sys.stderr,
            )
