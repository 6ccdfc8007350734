"""The verbs of the command line, with their arguments. Each imports what is heavy when it runs."""

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_exp.errors import ConfigError, RunFailed, Terminated

# Hydra's flags that print something instead of training, or lead elsewhere
HYDRAS_OWN = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i",
              "--shell-completion", "-sc", "--resolve", "--package", "-p", "--config-path", "-cp",
              "--experimental-rerun")  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """What can be typed behind `mnist-exp`."""

    name: str
    usage: str  # its arguments, for the list of verbs
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status

    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"mnist-exp {self.name}", description=self.summary, allow_abbrev=False
        )
        self.add_arguments(parser)
        return parser

    def __call__(self, words: list[str]) -> int:
        if self.name == "train" and any(word.split("=")[0] in HYDRAS_OWN for word in words):
            return _hydra(words)
        return self.run(self.parser().parse_intermixed_args(words))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser, "key=value, group=option")
    parser.add_argument("--multirun", "-m", action="store_true", help="a sweep")
    parser.add_argument("--config-name", "-cn", default="config", help="instead of config.yaml")
    parser.add_argument("--config-dir", "-cd", help="one more folder of config groups")


def _train(asked: argparse.Namespace) -> int:
    from hydra.types import RunMode

    from mnist_exp import config as configs

    composed = None
    if not asked.multirun:
        composed = configs.compose(asked.overrides, asked.config_name, asked.config_dir)
    if composed is None or composed.hydra.mode == RunMode.MULTIRUN:
        return _sweep(asked)
    # before torch's seconds of import
    _say_store(configs.validate(configs.task_config(composed)).tracking.uri)
    return _train_one(composed)


def _sweep(asked: argparse.Namespace) -> int:
    from mnist_exp import config as configs
    from mnist_exp import grid

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    context, master = configs.compose_sweep(asked.overrides, asked.config_name, asked.config_dir)
    jobs = grid.jobs(context, master, say)  # before torch's seconds of import
    _say_store(master.tracking.uri)

    from mnist_exp import sweep

    return _after_sweep(sweep.run_sweep(context, master, jobs))


def _say_store(asked: str | None) -> None:
    """Where the environment decides, and not what was typed."""
    from mnist_exp.tracking import ENVIRONMENT

    decided = os.environ.get(ENVIRONMENT)
    if asked is not None and decided and decided != asked:
        print(
            f"mnist-exp: {ENVIRONMENT}={decided} is used, and not tracking.uri={asked}",
            file=sys.stderr,
        )


def _after_sweep(swept: Any) -> int:
    short = swept.run_id[:8]
    print(f"sweep {swept.run_id}")
    print(f"output {swept.folder}")
    if swept.best is not None:
        words = ["train", f"experiments={swept.best}"]
        print(f"train the best again: {command(*words, store=swept.store)}")
    _say_where(short, swept)
    if swept.failure:
        raise RunFailed(f"sweep {short}: {swept.failure}")
    return 0


def _train_one(composed: Any) -> int:
    from mnist_exp import run
    from mnist_exp.console import Terminal

    return _after_run(run.train_composed(composed, Terminal()))


def _after_run(result: Any) -> int:
    loss = result.test["test/loss"]
    print(f"test accuracy {result.test_accuracy:.2%}  (loss {loss:.4f})")
    if "best/epoch" in result.test:
        print(
            f"the weights are those of epoch {result.test['best/epoch']:.0f}, the best of "
            f"validation ({result.test['best/val_accuracy']:.2%})"
        )
    print(f"run {result.run_id}")
    print(f"output {result.output_dir}")
    _say_where(result.run_id[:8], result)
    return 0


def _say_where(short: str, ended: Any) -> None:
    if ended.delivered:
        print(f"look at it: {command('ui', short, store=ended.store)}")
    else:
        print(f"MLflow does not have all of it yet. To bring it there: {command('sync')}")


def command(*words: str, store: str | None = None) -> str:
    """What to type to run a verb of this program, on this store, from here."""
    from mnist_exp.config import output_root
    from mnist_exp.tracking import ENVIRONMENT, store_uri

    called = Path(sys.argv[0])
    on_path = shutil.which("mnist-exp")
    if called.name == "__main__.py":
        program = [sys.executable, "-m", "mnist_exp"]
    elif on_path and Path(on_path).resolve() == called.resolve():
        program = ["mnist-exp"]
    else:
        program = [str(called)]
    usual = store is None or store == store_uri(None, output_root())
    if usual:
        return shlex.join([*program, *words])
    if os.environ.get(ENVIRONMENT):  # which counts before all else
        return shlex.join([f"{ENVIRONMENT}={store}", *program, *words])
    return shlex.join([*program, *words, f"tracking.uri={store}"])


def _hydra(words: list[str]) -> int:
    """Hydra's own program, for its flags that print something."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from mnist_exp import config as configs

    configs.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on: main() says them
    typed, sys.argv = sys.argv, ["mnist-exp train", *words]

    def job(config: Any) -> None:
        sys.argv = typed  # for the record of the run
        with open_dict(config):
            config.hydra = OmegaConf.create({"hydra": HydraConfig.get()}).hydra
        _train_one(config)

    program = hydra.main(
        version_base="1.3", config_path=str(configs.project_root() / "conf"), config_name="config"
    )(job)
    try:
        program()
    except ConfigError:
        raise
    except configs.COMPOSITION_ERRORS as error:
        raise configs.explain(error, [w for w in words if not w.startswith("-")]) from error
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser, "dataset=kmnist, ...")
    parser.add_argument("--output", "-o", type=Path, help="the picture: a .png, .svg or .pdf file")


def _show(asked: argparse.Namespace) -> int:
    from mnist_exp import run

    print(run.show(asked.overrides, asked.output))
    return 0


def _store_uri(overrides: Sequence[str], required: bool = True) -> str:
    """The store that a verb looks into. Raises ConfigError; `required`: also where no server
    answers."""
    from mnist_exp import config as configs
    from mnist_exp import tracking

    config = configs.validate(configs.task_config(configs.compose(overrides)))
    uri = tracking.store_uri(config.tracking.uri, configs.output_root())
    tracking.check_store(uri, required=required)
    return uri


def _open_store(overrides: Sequence[str]) -> Any:
    """That store, opened, with what is waiting for it. Raises ConfigError; creates none."""
    from mnist_exp import courier, tracking
    from mnist_exp.config import output_root
    from mnist_exp.tracker import index_at

    uri = _store_uri(overrides)
    _, problems = courier.sync(index_at(output_root()), uri)
    for folder, why in problems.items():
        print(f"mnist-exp: {folder}: not in MLflow yet: {why}", file=sys.stderr)
    if not tracking.has_runs(uri):
        raise ConfigError(f"{uri}: there are no runs yet. To make one: mnist-exp train")
    return tracking.Store(uri)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run id, its beginning, or last")
    _add_overrides(parser)


def _evaluate(asked: argparse.Namespace) -> int:
    store = _open_store(asked.overrides)
    recorded = store.find(asked.run)  # before torch's seconds of import

    from mnist_exp import run

    found = run.evaluate(store, recorded)
    print(f"run            {found.run_id}  {found.name}")
    for key, value in found.test.items():
        text = f"{value:.2%}" if key.endswith("accuracy") else f"{value:.6f}"
        known = found.recorded.get(key)
        same = "not recorded" if known is None else f"recorded {known:.6f}"
        print(f"{key:14} {text}  ({same})")
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="the id of its parent run, or last")
    _add_overrides(parser)
    parser.add_argument("--output", "-o", type=Path, help="a folder for the files, as well")


def _report(asked: argparse.Namespace) -> int:
    store = _open_store(asked.overrides)
    parent = store.find(asked.sweep, sweep=True)

    from mnist_exp import results
    from mnist_exp.console import Terminal

    files = results.report_again(store, parent, asked.output, Terminal())
    print(f"on the parent run {parent.info.run_id}: {', '.join(files)}")
    if asked.output is not None:
        print(f"output {asked.output.resolve()}")
    return 0


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_SWEEP", help="an id, its beginning, last, a folder")
    _add_overrides(parser)
    parser.add_argument("--failed", action="store_true", help="of a sweep, also jobs that failed")


def _resume(asked: argparse.Namespace) -> int:
    uri = _store_uri(asked.overrides, required=False)  # before torch's seconds of import

    from mnist_exp import resume
    from mnist_exp.config import output_root
    from mnist_exp.console import Terminal
    from mnist_exp.sweep import Swept
    from mnist_exp.tracker import index_at

    folder = resume.find(asked.run, uri, index_at(output_root()))
    try:
        ended = resume.resume(folder, asked.failed, Terminal())
    except (KeyboardInterrupt, Terminated) as error:
        if not getattr(error, "__notes__", []):  # before it had begun
            error.add_note(str(folder))
        raise
    if ended is None:
        return 0
    return _after_sweep(ended) if isinstance(ended, Swept) else _after_run(ended)


def _sync_arguments(parser: argparse.ArgumentParser) -> None:
    """None: all that waits is brought to wherever it was meant for."""


def _sync(asked: argparse.Namespace) -> int:
    from mnist_exp import courier
    from mnist_exp.config import output_root
    from mnist_exp.tracker import index_at

    count, problems = courier.sync(index_at(output_root()))
    print(f"{count} of {count + len(problems)} waiting runs delivered")
    if problems:
        raise RunFailed(
            "\n".join(f"{folder}: not delivered: {why}" for folder, why in problems.items())
        )
    return 0


def _ui_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="open it on this run")
    _add_overrides(parser)
    parser.add_argument("--port", type=int, default=5000, help="0: any that is free")


def _ui(asked: argparse.Namespace) -> int:
    if asked.run is not None and "=" in asked.run:
        asked.overrides, asked.run = [asked.run, *asked.overrides], None

    from mnist_exp import ui

    store = _open_store(asked.overrides)
    page = store.page(asked.run)
    if store.uri.startswith(("http://", "https://")):
        print(f"this store has a UI of its own: {store.uri.rstrip('/')}/{page}")
        return 0
    ui.serve(store.uri, ui.free_port(asked.port), page)
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        metavar="SHELL",
        choices=("bash", "zsh", "fish"),
        help='to switch it on in bash or zsh: eval "$(mnist-exp completion SHELL)"; '
        "in fish: mnist-exp completion fish | source",
    )
    # what the shell's script asks with
    parser.add_argument("--line", help=argparse.SUPPRESS)


def _completion(asked: argparse.Namespace) -> int:
    from mnist_exp import completion

    if asked.line is None:
        print(completion.SCRIPTS[asked.shell].strip())
        return 0
    with contextlib.suppress(Exception), warnings.catch_warnings():  # somebody is typing
        warnings.simplefilter("ignore")
        breaks = os.environ.get("COMP_WORDBREAKS", "")
        for line in completion.answer(asked.shell, asked.line, breaks):
            print(line)
    return 0


def _add_overrides(parser: argparse.ArgumentParser, such: str = "tracking.uri=...") -> None:
    """The default is what lets argparse know that none are needed."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=such)


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "train",
            "[OVERRIDE ...]",
            "one run; with -m, a sweep (Hydra's command line; train --help)",
            _train_arguments,
            _train,
        ),
        Verb(
            "show",
            "[OVERRIDE ...]",
            "the dataset's first 30 images as a PNG, and its facts",
            _show_arguments,
            _show,
        ),
        Verb(
            "evaluate",
            "RUN",
            "the saved model of a run on the official test set",
            _evaluate_arguments,
            _evaluate,
        ),
        Verb(
            "report",
            "SWEEP",
            "leaderboard, heat maps and best recipe of a sweep, again",
            _report_arguments,
            _report,
        ),
        Verb("resume", "RUN_OR_SWEEP", "goes on where it stopped", _resume_arguments, _resume),
        Verb(
            "sync",
            "",
            "brings to MLflow what a server that failed has not got",
            _sync_arguments,
            _sync,
        ),
        Verb("ui", "[RUN]", "the MLflow UI on the project's store", _ui_arguments, _ui),
        Verb(
            "completion",
            "SHELL",
            "completion with TAB for bash, zsh or fish",
            _completion_arguments,
            _completion,
        ),
    )
}
