"""The verbs of the command line, with their arguments. Each imports what is heavy when it runs."""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_exp import api
from mnist_exp.errors import ConfigError, RunFailed

# Hydra's flags that print something instead of training, or lead elsewhere
HYDRAS_OWN = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i",
              "--shell-completion", "-sc", "--resolve", "--package", "-p", "--config-path", "-cp",
              "--experimental-rerun")  # fmt: skip

WHERE = "tracking.uri=..., and dataset.root=FOLDER where the data has moved"
FORMATS = (
    "png",
    "svg",
    "pdf",
)  # as in figures/style.py, whose import takes half a second


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
    parser.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="one more folder of config groups"
    )


def _train(asked: argparse.Namespace) -> int:
    from hydra.types import RunMode

    from mnist_exp.config.compose import compose
    from mnist_exp.config.schema import task_config
    from mnist_exp.config.validate import validate
    from mnist_exp.tracking.store import warn_if_environment_wins

    composed = None
    if not asked.multirun:
        composed = compose(asked.overrides, asked.config_name, asked.config_dir)
    if composed is None or composed.hydra.mode == RunMode.MULTIRUN:
        return _sweep(asked)
    # before torch's seconds of import
    warn_if_environment_wins(validate(task_config(composed)).tracking.uri)
    return _train_one(composed)


def _sweep(asked: argparse.Namespace) -> int:
    from mnist_exp.config.compose import compose_sweep
    from mnist_exp.sweeps import grid
    from mnist_exp.tracking.store import warn_if_environment_wins

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    context, master = compose_sweep(asked.overrides, asked.config_name, asked.config_dir)
    jobs = grid.jobs(context, master, say)  # before torch's seconds of import
    warn_if_environment_wins(master.tracking.uri)

    from mnist_exp.sweeps import sweep

    return _after_sweep(sweep.run_sweep(context, master, jobs))


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
    from mnist_exp.runs import train as run
    from mnist_exp.runs.console import Terminal
    from mnist_exp.runs.job import prepare

    job = prepare(composed)
    return _after_run(run.train(job, job.folder, Terminal()))


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
    from mnist_exp.config.paths import output_root
    from mnist_exp.tracking.store import ENVIRONMENT, store_uri

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

    from mnist_exp.config import paths
    from mnist_exp.config.explain import explain
    from mnist_exp.config.hydra_adapter import COMPOSITION_ERRORS, register

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on: main() says them
    typed, sys.argv = sys.argv, ["mnist-exp train", *words]

    def job(config: Any) -> None:
        sys.argv = typed  # for the record of the run
        with open_dict(config):
            config.hydra = OmegaConf.create({"hydra": HydraConfig.get()}).hydra
        _train_one(config)

    program = hydra.main(
        version_base="1.3", config_path=str(paths.project_root() / "conf"), config_name="config"
    )(job)
    try:
        program()
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise explain(error, [w for w in words if not w.startswith("-")]) from error
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser, "dataset=kmnist, ...")
    parser.add_argument(
        "--output", "-o", type=_path, metavar="FILE", help="the picture: a .png, .svg or .pdf file"
    )


def _show(asked: argparse.Namespace) -> int:
    _check_figure("--output", asked.output)

    dataset = api.load(asked.overrides)

    from mnist_exp.config.paths import output_root
    from mnist_exp.figures import samples

    path = asked.output or output_root() / "outputs" / f"{dataset.name}.png"
    _save_figure("--output", path, samples.first_images(dataset))
    channels, height, width = dataset.shape
    val = f", {len(dataset.val):,} validation" if dataset.val is not None else ""
    print(f"dataset  {dataset.name} ({dataset.source})")
    print(f"images   {len(dataset.train):,} training{val}, {len(dataset.test):,} test")
    print(f"size     {channels} x {height} x {width}, 8 bits a pixel")
    print(f"classes  {len(dataset.classes)}: {', '.join(dataset.classes)}")
    print(f"pixels   mean {dataset.mean:.4f}, std {dataset.std:.4f} (training images, 0 to 1)")
    print(f"picture  {path}")
    return 0


def _path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("it is empty: a file or a folder has to be named")
    return Path(text)


def _check_figure(option: str, path: Path | None) -> None:
    """Before the work: raises ConfigError where the figure could not be written after it."""
    if path is None:
        return
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ConfigError(f"{option} {path}: must end in .png, .svg or .pdf")

    from mnist_exp.system import files

    with files.reporting_write_errors(option, path):
        files.check_writable_file(path)


def _check_folder(option: str, folder: Path | None) -> None:
    """The same for the folder of several figures."""
    from mnist_exp.system import files

    if folder is not None:
        with files.reporting_write_errors(option, folder):
            files.check_writable_folder(folder)


def _save_figure(option: str, path: Path, figure: Any) -> None:
    from mnist_exp.figures import style
    from mnist_exp.system import files

    with files.reporting_write_errors(option, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        style.save(figure, path)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_SWEEP", help="a run, or a sweep")
    _add_overrides(parser, WHERE)
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="of a sweep: average the probabilities of its chosen cell over the seeds",
    )
    parser.add_argument(
        "--output",
        "-o",
        type=_path,
        metavar="FOLDER",
        help="of the figures, if not in outputs/",
    )
    _add_format(parser)


def _evaluate(asked: argparse.Namespace) -> int:
    _check_folder("--output", asked.output)
    together = api.ensemble(asked.run, asked.overrides) if asked.ensemble else None
    evaluated = together.whole if together else api.evaluate(asked.run, asked.overrides)

    from mnist_exp.config.paths import output_root
    from mnist_exp.runs import evaluate as evaluation
    from mnist_exp.runs.console import Terminal

    terminal = Terminal()
    folder = asked.output or output_root() / "outputs" / "evaluations" / evaluated.run_id[:8]
    files = evaluation.save(evaluated.draw(), folder, asked.format)
    if together:
        terminal.table("members", *together.table())
    print(f"run            {evaluated.run_id}  {evaluated.name}")
    low, high = evaluated.interval
    within = f"  95 % interval {low:.2%} to {high:.2%}"
    for key, value in evaluated.test.items():
        form = ".2%" if key.endswith("accuracy") else ".6f"
        known = evaluated.recorded.get(key)
        before = "not recorded" if known is None else f"recorded {known:{form}}"
        print(
            f"{key:14} {value:{form}}"
            + f"  ({before})" * (together is None)
            + within * key.endswith("accuracy")
        )
    print(f"calibration    {evaluated.calibration.error:.2%} expected error, 15 bins of confidence")
    if together:
        accuracy, loss = (together.gain(key) for key in ("test/accuracy", "test/loss"))
        print(
            f"adds           {100 * accuracy:+.2f} percentage points of accuracy, {loss:+.4f} of "
            f"loss, to the mean of its members"
        )
    terminal.table("classes", *evaluated.table())
    print(f"figures        {', '.join(files)}\noutput         {folder.resolve()}")
    return 0


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run id, its beginning, or last")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="PNG, JPEG, BMP, ... (./-NAME where a name begins with a dash); and tracking.uri=...",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="take the images as they are: light ink on black, as in MNIST. Otherwise they are "
        "taken for ink on paper, inverted, cropped and centred as MNIST's own were",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--figure",
        type=_path,
        metavar="FILE",
        help="draw what was given and what the network saw: a .png, .svg or .pdf file",
    )


def _predict(asked: argparse.Namespace) -> int:
    _check_figure("--figure", asked.figure)
    overrides = [w for w in asked.images if re.match(r"[\w.]+=", w) and not os.path.exists(w)]
    files = [Path(word) for word in asked.images if word not in overrides]
    if not files or "" in asked.images:
        raise ConfigError(
            "IMAGE: none is given, or an empty name. To predict: mnist-exp predict RUN IMAGE ..."
        )
    if asked.figure is not None and asked.figure.resolve() in [file.resolve() for file in files]:
        raise ConfigError(f"--figure {asked.figure}: it is one of the images. Name another file")
    store = api.open_store(overrides)
    found = store.find(asked.run)  # before torch's seconds of import

    from mnist_exp.runs import predict as prediction
    from mnist_exp.runs.console import Terminal

    predictions = prediction.predict(store, found, files, asked.raw)
    read = [one for one in predictions if not one.problem]
    if asked.figure is not None and read:
        _save_figure("--figure", asked.figure, prediction.draw(predictions, found.name))
        print(f"figure {asked.figure.resolve()}", file=sys.stderr)
    elif asked.figure is not None:
        print(f"mnist-exp: --figure {asked.figure}: no image, no figure", file=sys.stderr)
    if asked.json:
        print(json.dumps([one.as_json() for one in predictions], indent=1))
    elif read:
        rows = [
            [_printable(one.file), *(f"{name}  {share:.2%}" for name, share in one.classes)]
            for one in read
        ]
        Terminal().table(found.name, ["image", "class", "next", "after that"], rows)
    for one in predictions:
        if one.problem:
            print(f"mnist-exp: {_printable(one.file)}: {one.problem}", file=sys.stderr)
    return 0 if len(read) == len(predictions) else 1


def _printable(path: Path) -> str:
    """A name can hold line breaks, and what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(path))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help="the id of its parent run, or last")
    _add_overrides(parser)
    parser.add_argument(
        "--output", "-o", type=_path, metavar="FOLDER", help="for the files, as well"
    )
    _add_format(parser)


def _report(asked: argparse.Namespace) -> int:
    _check_folder("--output", asked.output)
    store = api.open_store(asked.overrides)
    parent = store.find(asked.sweep, sweep=True)

    from mnist_exp.runs.console import Terminal
    from mnist_exp.sweeps import finish

    report = finish.report_again(store, parent, asked.output, asked.format, Terminal())
    print(f"on the parent run {parent.id}: {', '.join(report.files)}")
    if asked.output is not None:
        print(f"output {asked.output.resolve()}")
    return 0


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_FOLDER", help="an id, its beginning, last, a folder")
    _add_overrides(parser)
    parser.add_argument("--failed", action="store_true", help="of a sweep, also jobs that failed")


def _resume(asked: argparse.Namespace) -> int:
    result = api.resume(asked.run, asked.overrides, verbose=True, failed=asked.failed)
    if result is None:
        return 0

    from mnist_exp.sweeps.sweep import SweepResult

    return _after_sweep(result) if isinstance(result, SweepResult) else _after_run(result)


def _reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run id, its beginning, or last")
    _add_overrides(parser, WHERE)
    parser.add_argument("--threads", type=int, help="CPU threads, if not as many as before")
    parser.add_argument("--device", help="cpu, cuda, mps, if not the one of before")
    parser.add_argument("--keep", metavar="URI", help="keep the second run, in this MLflow store")


def _reproduce(asked: argparse.Namespace) -> int:
    again = api.reproduce(
        asked.run,
        asked.overrides,
        verbose=True,
        keep=asked.keep,
        threads=asked.threads,
        device=asked.device,
    )

    from mnist_exp.runs.console import Terminal

    print(f"run {again.run_id}  {again.name}")
    if again.kept is not None:
        print(f"again {again.kept_id}\noutput {again.kept}")
        _say_where(again.kept_id[:8], again)
    Terminal().table("recorded, and again", *again.table())
    print(again.verdict + (". What is not as it was:" if again.differences else ""))
    for difference in again.differences:
        print(f"  {difference}")
    if again.verdict != "identical" and not again.differences:
        print("  nothing that is recorded tells why")
    return 1 if again.verdict == "different" else 0


def _sync_arguments(parser: argparse.ArgumentParser) -> None:
    """None: all that waits is brought to wherever it was meant for."""


def _sync(asked: argparse.Namespace) -> int:
    from mnist_exp.config.paths import output_root
    from mnist_exp.tracking import upload
    from mnist_exp.tracking.run_log import open_runs_at

    count, problems = upload.sync(open_runs_at(output_root()))
    print(f"{count} of {count + len(problems)} waiting runs delivered")
    if problems:
        raise RunFailed(
            "\n".join(f"{folder}: not delivered: {why}" for folder, why in problems.items())
        )
    return 0


def _ui_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN_OR_SWEEP", help="open it on this one")
    _add_overrides(parser)
    parser.add_argument("--port", type=int, default=5000, help="0: any that is free")


def _ui(asked: argparse.Namespace) -> int:
    if asked.run is not None and "=" in asked.run:
        asked.overrides, asked.run = [asked.run, *asked.overrides], None

    from mnist_exp.cli import ui_server as ui

    store = api.open_store(asked.overrides)
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
    parser.add_argument("--breaks", default="", help=argparse.SUPPRESS)  # COMP_WORDBREAKS


def _completion(asked: argparse.Namespace) -> int:
    from mnist_exp.cli import completion

    if asked.line is None:
        print(completion.SCRIPTS[asked.shell].strip())
        return 0
    with contextlib.suppress(Exception), warnings.catch_warnings():  # somebody is typing
        warnings.simplefilter("ignore")
        for line in completion.answer(asked.shell, asked.line, asked.breaks):
            print(line)
    return 0


def _add_overrides(parser: argparse.ArgumentParser, such: str = "tracking.uri=...") -> None:
    """The default is what lets argparse know that none are needed."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=such)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the figures written")


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
            "RUN_OR_SWEEP",
            "the saved model of a run on the official test set; figures",
            _evaluate_arguments,
            _evaluate,
        ),
        Verb(
            "predict",
            "RUN IMAGE ...",
            "the class of image files, photographs of ink on paper included",
            _predict_arguments,
            _predict,
        ),
        Verb(
            "report",
            "SWEEP",
            "leaderboard, heat maps and best recipe of a sweep, again",
            _report_arguments,
            _report,
        ),
        Verb("resume", "RUN_OR_FOLDER", "goes on where it stopped", _resume_arguments, _resume),
        Verb(
            "reproduce",
            "RUN",
            "trains it again from its record alone, and compares every epoch",
            _reproduce_arguments,
            _reproduce,
        ),
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
