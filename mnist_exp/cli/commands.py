"""The commands that train, and those that look at what was trained, from words to lines."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp import api
from mnist_exp.cli.command import (
    COMMANDS,
    FORMAT,
    RUN,
    STORE_AND_DATA,
    TTA,
    argument,
    check_figure,
    check_writable,
    command,
    command_line,
    overrides,
    path,
    save_figures,
)
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.formatting import printable

if TYPE_CHECKING:
    from mnist_exp.run.evaluate import Evaluation
    from mnist_exp.run.recorder import Result
    from mnist_exp.sweeps.sweep import SweepResult

# Flags of Hydra's that print something instead of training, or lead elsewhere.
HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i",
               "--shell-completion", "-sc", "--resolve", "--package", "-p", "--config-path", "-cp",
               "--experimental-rerun")  # fmt: skip


def run(name: str, words: Sequence[str]) -> int:
    """Run the command of a name on the words behind it, and return the exit status."""
    if name == "train" and any(word.split("=")[0] in HYDRA_FLAGS for word in words):
        return _train_with_hydra(words)
    return COMMANDS[name].run(words)


@command(
    "[OVERRIDE ...]",
    "one run; with -m, a sweep (Hydra's command line; train --help)",
    overrides("key=value, group=option"),
    argument("--multirun", "-m", action="store_true", help="a sweep"),
    argument("--config-name", "-cn", default="config", help="instead of config.yaml"),
    argument("--config-dir", "-cd", metavar="FOLDER", help="one more folder of config groups"),
)
def train(args: argparse.Namespace) -> int:
    """Train one run, or a sweep."""
    from mnist_exp.config.compose import compose
    from mnist_exp.config.hydra_adapter import is_sweep

    place = {"config_name": args.config_name, "config_dir": args.config_dir}
    composed = None if args.multirun else compose(args.overrides, **place)
    if composed is None or is_sweep(composed):
        return _print_sweep(api.train_sweep(args.overrides, verbose=True, **place))
    return _print_run(api.train_composed(composed, verbose=True))


def _train_with_hydra(words: Sequence[str]) -> int:
    """Let Hydra's own program print what a flag of its asks for, or start the run."""
    from mnist_exp.config.compose import run_hydra

    run_hydra(words, lambda composed: _print_run(api.train_composed(composed, verbose=True)))
    return 0


@command(
    "[OVERRIDE ...]",
    "the dataset's first 30 images as a PNG, and its facts",
    overrides("dataset=kmnist, augmentation=elastic, ..."),
    argument(
        "--output", "-o", type=path, metavar="FILE", help="the picture: a .png, .svg or .pdf file"
    ),
)
def show(args: argparse.Namespace) -> int:
    """Print the facts of a data set, and draw its first images."""
    from mnist_exp.config.paths import output_root
    from mnist_exp.run.console import reporting

    check_figure("--output", args.output)
    with reporting(announcement="the first images of a data set: loading torch ..."):
        overview = api.show(args.overrides)

    suffix = "-augmented" if "augmentation" in overview.facts else ""
    file = args.output or output_root() / "outputs" / f"{overview.dataset.name}{suffix}.png"
    save_figures("--output", file, {file: overview.figure})
    facts = {**overview.facts, "picture": file}
    width = max(8, *map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}} {fact}")
    return 0


@command(
    "RUN_OR_SWEEP",
    "the saved model of a run on the test set or on validation; figures",
    argument("run", metavar="RUN_OR_SWEEP", help="a run, or a sweep"),
    STORE_AND_DATA,
    argument(
        "--ensemble",
        action="store_true",
        help="of a sweep: average the probabilities of its chosen cell over the seeds",
    ),
    argument(
        "--split",
        choices=("val", "test"),
        default="test",
        help="the official test set, or the validation images, which are there to choose by",
    ),
    TTA,
    argument(
        "--output", "-o", type=path, metavar="FOLDER", help="of the figures, if not in outputs/"
    ),
    FORMAT,
)
def evaluate(args: argparse.Namespace) -> int:
    """Print what a saved model comes to on the images of a split, and draw it."""
    from mnist_exp.config.paths import output_root
    from mnist_exp.run.console import reporting

    check_writable("--output", args.output)
    words, options = (args.run, args.overrides), {"split": args.split, "tta": args.tta}
    what = f"{args.run} on the {args.split} split"
    with reporting(announcement=f"{what}: loading torch ...") as terminal:
        ensemble = api.ensemble(*words, **options) if args.ensemble else None
        evaluation = ensemble.whole if ensemble else api.evaluate(*words, **options)
        kept = output_root() / "outputs" / "evaluations" / evaluation.run_id[:8]
        folder = args.output or kept / evaluation.variant
        drawn = evaluation.draw().items()
        figures = {folder / f"{name}.{args.format}": figure for name, figure in drawn}
        save_figures("--output", folder, figures)
    if ensemble:
        terminal.table("members", *ensemble.table())
    print(f"run            {evaluation.run_id}  {evaluation.name}")
    _print_scores(evaluation, has_record=not ensemble and args.split == "test")
    if ensemble:
        loss, accuracy = map(ensemble.gain, evaluation.scores)
        print(
            f"adds           {100 * accuracy:+.3f} percentage points of accuracy, {loss:+.5f} of "
            f"loss, to the mean of its members"
        )
    terminal.table("classes", *evaluation.table())
    print(f"figures        {', '.join(file.name for file in figures)}")
    print(f"output         {folder.resolve()}")
    if not ensemble:
        plain = f"{kept / 'predictions.json'}, for compare"
        other = "not kept: compare takes those of the plain model on the test set"
        print(f"predictions    {other if evaluation.variant else plain}")
    return 0


def _print_scores(evaluation: "Evaluation", has_record: bool) -> None:
    """Print the images, and loss, accuracy and calibration, beside what the run has recorded."""
    print(f"images         {len(evaluation.examples):,} of the {evaluation.title}")
    low, high = evaluation.interval
    of_plain = " without --tta" if evaluation.views else ""
    for key, value in evaluation.scores.items():
        spec = ".2%" if key.endswith("accuracy") else ".6f"
        line = f"{key:14} {value:{spec}}"
        if has_record:
            recorded = evaluation.recorded.get(key)
            before = "not recorded" if recorded is None else f"recorded{of_plain} {recorded:{spec}}"
            line += f"  ({before})"
        if key.endswith("accuracy"):
            line += f"  95 % interval {low:.2%} to {high:.2%}"
        print(line)
    error = evaluation.calibration.error
    print(f"calibration    {error:.2%} expected error, 15 bins of confidence")


@command(
    "RUN IMAGE ...",
    "the class of image files, photographs of ink on paper included",
    RUN,
    argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="PNG, JPEG, BMP, ... (./-NAME where a name begins with a dash); and tracking.uri=...",
    ),
    argument(
        "--raw",
        action="store_true",
        help="take the images as they are: light ink on black, as in MNIST. Otherwise they are "
        "taken for ink on paper, inverted, cropped and centred as MNIST's own were",
    ),
    TTA,
    argument("--json", action="store_true", help="print JSON instead of a table"),
    argument(
        "--figure",
        type=path,
        metavar="FILE",
        help="draw what was given and what the network saw: a .png, .svg or .pdf file",
    ),
)
def predict(args: argparse.Namespace) -> int:
    """Print the classes of image files, and the problem of those that cannot be read."""
    from mnist_exp.formatting import count_of
    from mnist_exp.run.console import reporting

    figure: Path | None = args.figure
    check_figure("--figure", figure)
    files, typed = _divide(args.images)
    if figure is not None and os.path.realpath(figure) in map(os.path.realpath, files):
        raise ConfigError(f"--figure {figure}: it is one of the images. Name another file")
    what = f"{count_of(len(files), 'image')} by the model of {args.run}"
    with reporting(announcement=f"{what}: loading torch ...") as terminal:
        predictions = api.predict(files, args.run, typed, args.raw, args.tta)
    readable = [p for p in predictions if not p.problem]
    if figure is not None and readable:
        save_figures("--figure", figure, {figure: api.predictions_figure(predictions)})
        print(f"figure {figure.resolve()}", file=sys.stderr)
    elif figure is not None:
        print(f"mnist-exp: --figure {figure}: no image, no figure", file=sys.stderr)
    if args.json:
        print(json.dumps([p.as_json() for p in predictions], indent=1))
    elif readable:
        rows = [
            [printable(str(p.file)), *(f"{name}  {share:.2%}" for name, share in p.classes)]
            for p in readable
        ]
        terminal.table(readable[0].title, ["image", "class", "next", "after that"], rows)
    for p in predictions:
        if p.problem:
            print(f"mnist-exp: {printable(str(p.file))}: {p.problem}", file=sys.stderr)
    return 0 if len(readable) == len(predictions) else 1


@command(
    "SWEEP",
    "leaderboard, heat maps and best recipe of a sweep, again",
    argument("sweep", metavar="SWEEP", help="the id of its parent run, or last"),
    overrides(),
    argument("--output", "-o", type=path, metavar="FOLDER", help="for the files, as well"),
    FORMAT,
)
def report(args: argparse.Namespace) -> int:
    """Print the report on a sweep again."""
    check_writable("--output", args.output)
    sweep = api.report(
        args.sweep, args.overrides, verbose=True, output=args.output, suffix=args.format
    )
    print(f"on the parent run {sweep.run_id}: {', '.join(sweep.files)}")
    if args.output is not None:
        print(f"output {args.output.resolve()}")
    return 0


@command(
    "RUN_OR_FOLDER",
    "goes on where it stopped",
    argument("run", metavar="RUN_OR_FOLDER", help="an id, its beginning, last, a folder"),
    overrides(),
    argument("--failed", action="store_true", help="of a sweep, also jobs that failed"),
)
def resume(args: argparse.Namespace) -> int:
    """Go on with a run or a sweep."""
    result = api.resume(args.run, args.overrides, verbose=True, failed=args.failed)
    if result is None:
        return 0

    from mnist_exp.sweeps.sweep import SweepResult

    return _print_sweep(result) if isinstance(result, SweepResult) else _print_run(result)


@command(
    "RUN",
    "trains it again from its record alone, and compares every epoch",
    RUN,
    STORE_AND_DATA,
    argument("--threads", type=int, help="CPU threads, if not as many as before"),
    argument("--device", help="cpu, cuda, mps, if not the one of before"),
    argument("--keep", metavar="URI", help="keep the second run, in this MLflow store"),
)
def reproduce(args: argparse.Namespace) -> int:
    """Train a run again, and print how far the two agree."""
    again = api.reproduce(
        args.run,
        args.overrides,
        verbose=True,
        keep=args.keep,
        threads=args.threads,
        device=args.device,
    )

    from mnist_exp.run.console import Terminal

    print(f"run {again.run_id}  {again.name}")
    if again.kept is not None:
        print(f"again {again.kept_id}\noutput {again.kept}")
        _print_next_step(again.kept_id, again.store, again.uploaded)
    Terminal().table("recorded, and again", *again.table())
    print(again.verdict + (". What is not as it was:" if again.differences else ""))
    for difference in again.differences:
        print(f"  {difference}")
    if again.verdict != "identical" and not again.differences:
        print("  nothing that is recorded tells why")
    return 1 if again.verdict == "different" else 0


@command(
    "[FOLDER ...]",
    "uploads to MLflow what a server did not receive",
    argument("folders", nargs="*", type=path, metavar="FOLDER", help="of a run or a sweep"),
    argument("--to", metavar="URI", help="bring it to this store instead, from now on"),
    argument("--forget", action="store_true", help="give up the runs in these folders"),
)
def sync(args: argparse.Namespace) -> int:
    """Upload what waits, each run to the store it is meant for."""
    from mnist_exp.run.console import reporting

    with reporting(announcement="looking for what waits ..."):
        count, problems = api.sync(args.folders, to=args.to, forget=args.forget)
    if args.forget:
        print(f"{count} of the waiting runs given up; the records stay in their folders")
        return 0
    print(f"{count} of {count + len(problems)} waiting runs delivered")
    if problems:
        lines = [f"{folder}: not delivered: {reason}" for folder, reason in problems.items()]
        to_another, given_up = (
            command_line("sync", "FOLDER", *words) for words in (["--to", "URI"], ["--forget"])
        )
        lines.append(f"To bring one to another store: {to_another}. To give it up: {given_up}")
        text = "\n".join(lines)
        if any(folder.exists() for folder in problems):
            raise RunFailed(text)
        print(text)  # nothing is left that could be delivered
    return 0


@command(
    "[RUN]",
    "the MLflow UI on the project's store",
    argument("run", nargs="?", metavar="RUN_OR_SWEEP", help="open it on this one"),
    overrides(),
    argument("--port", type=int, default=5000, help="0: any that is free"),
)
def ui(args: argparse.Namespace) -> int:
    """Serve MLflow's UI until Ctrl-C."""
    if args.run is not None and "=" in args.run:  # the run was left out
        args.overrides, args.run = [args.run, *args.overrides], None

    from mnist_exp.cli import ui_server
    from mnist_exp.run.console import reporting

    with reporting(announcement="opening the store ..."):
        store, page = api.ui_page(args.run, args.overrides)
    if store.startswith(("http://", "https://")):
        print(f"this store has a UI of its own: {store.rstrip('/')}/{page}")
        return 0
    ui_server.serve(store, ui_server.free_port(args.port), page)
    return 0


@command(
    "SHELL",
    "completion with TAB for bash, zsh or fish",
    argument(
        "shell",
        metavar="SHELL",
        choices=("bash", "zsh", "fish"),
        help='to switch it on in bash or zsh: eval "$(mnist-exp completion SHELL)"; '
        "in fish: mnist-exp completion fish | source",
    ),
)
def completion(args: argparse.Namespace) -> int:
    """Print what a shell has to evaluate for completion."""
    print(shell_code(args.shell))
    return 0


def shell_code(shell: str) -> str:
    """Return what bash, zsh or fish has to evaluate for completion."""
    from argcomplete.shell_integration import shellcode

    # without -o default: where there are no candidates, bash would offer files
    code = shellcode(["mnist-exp"], shell=shell, complete_arguments=["-o nospace", "-o nosort"])
    if shell == "zsh":
        code = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }\n" + code
    # fish would sort the newest run somewhere else
    return code.replace("complete --command mnist-exp -f", "complete --command mnist-exp -k -f")


def _print_run(result: "Result") -> int:
    print(f"run {result.run_id}")
    print(f"output {result.output_dir}")
    _print_next_step(result.run_id, result.store, result.uploaded)
    return 0


def _print_sweep(result: "SweepResult") -> int:
    print(f"sweep {result.run_id}")
    print(f"output {result.folder}")
    if result.best is not None:
        words = ["train", f"experiments={result.best}"]
        print(f"train the best again: {command_line(*words, store=result.store)}")
    _print_next_step(result.run_id, result.store, result.uploaded)
    if result.failure:
        raise RunFailed(f"sweep {result.run_id[:8]}: {result.failure}")
    return 0


def _print_next_step(run_id: str, store: str, uploaded: bool) -> None:
    if uploaded:
        print(f"look at it: {command_line('ui', run_id[:8], store=store)}")
    else:
        print(f"MLflow does not have all of it yet. To bring it there: {command_line('sync')}")


def _divide(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the image files and the overrides among words. Raise ConfigError without a file."""
    typed = [w for w in words if re.match(r"[\w.]+=", w) and not os.path.exists(w)]
    files = [Path(word) for word in words if word not in typed]
    if not files or "" in words:
        raise ConfigError(
            "IMAGE: none is given, or an empty name. To predict: mnist-exp predict RUN IMAGE ..."
        )
    return files, typed
