"""One run from its config to its record: compose, check, build, train, keep."""

import getpass
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from mnist_exp import __version__, checkpoint, data, metrics, plots, training
from mnist_exp import config as configs
from mnist_exp.config import Config
from mnist_exp.console import Reporter
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.models import Served
from mnist_exp.optim import Schedule
from mnist_exp.stack import Stack
from mnist_exp.tracking import DatasetFacts, Store, Tracker, check_store, store_uri

SHOWN = 30  # images in a sample grid
THREADS = torch.get_num_threads()  # torch's choice, before any run makes its own


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    run_id: str
    history: list[dict[str, float]]  # one dict an epoch, with the keys that MLflow has
    test: dict[str, float]  # test/loss, test/accuracy; with a validation split best/... as well
    model: torch.nn.Module  # on the CPU; takes images [B, C, H, W] with pixels from 0 to 1
    output_dir: Path
    store: str  # MLflow's tracking URI

    @property
    def test_accuracy(self) -> float:
        return self.test["test/accuracy"]


@dataclass(frozen=True)
class Job:
    """Everything a run needs, built and checked; nothing has been created."""

    config: Config
    composed: DictConfig  # Hydra's own part included
    asked: DictConfig  # without it
    name: str
    store_uri: str
    device: torch.device
    dataset: data.Dataset
    stack: Stack
    optimizer: type[torch.optim.Optimizer]
    optimizer_arguments: dict[str, Any]
    schedule: Schedule

    @property
    def choices(self) -> DictConfig:
        """Which option was chosen in each config group."""
        choices: DictConfig = self.composed.hydra.runtime.choices
        return choices

    @property
    def overrides(self) -> list[str]:
        """What was typed."""
        return list(self.composed.hydra.overrides.task)


def train(overrides: Sequence[str] = (), reporter: Reporter | None = None) -> Result:
    """Trains one run: `train(["model=cnn", "training.epochs=2"])`.

    The overrides are those of the command line, which is a thin layer over this function. Raises
    ConfigError, with nothing created, if the run cannot be what was asked for, and RunFailed if it
    does not reach its end.
    """
    config = configs.compose(overrides)
    return execute(prepare(config), Path(config.hydra.run.dir), reporter or Reporter())


def prepare(composed: DictConfig) -> Job:
    """Builds everything that a composed config asks for. Raises ConfigError."""
    asked = configs.task_config(composed)
    typed = configs.validate(asked)
    if not str(composed.hydra.run.dir).strip():
        raise ConfigError("hydra.run.dir=: must be a folder of its own for the run's output")
    uri = store_uri(typed.tracking.uri, configs.output_root())
    check_store(uri)
    device = _device(typed.training.device)
    torch.set_num_threads(typed.training.threads or THREADS)
    schedule = configs.build_schedule(typed)
    dummy = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer, arguments = configs.build_optimizer(typed, [dummy])
    dataset = load_dataset(typed)
    build = configs.build_model(typed, dataset.shape, len(dataset.classes))
    stack = Stack(build, [typed.seed], device)
    _check_last_batch(build, dataset, typed.training.batch_size)
    # once more, on what it will really get
    configs.build_optimizer(typed, [torch.nn.Parameter(p[0]) for p in stack.params.values()])
    return Job(
        config=typed,
        composed=composed,
        asked=asked,
        name=typed.tracking.run_name or _name(typed, composed.hydra.runtime.choices),
        store_uri=uri,
        device=device,
        dataset=dataset.to(device),
        stack=stack,
        optimizer=optimizer,
        optimizer_arguments=arguments,
        schedule=schedule,
    )


def _check_last_batch(
    build: Callable[[], torch.nn.Module], dataset: data.Dataset, batch_size: int
) -> None:
    """Raises ConfigError if the model cannot train on the epoch's last batch, of one image.

    Batch normalisation of single values cannot; better known now than after an epoch.
    """
    if len(dataset.train) % batch_size != 1 and batch_size != 1:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            build()(torch.zeros(1, *dataset.shape))
    except Exception as error:  # a model can raise anything
        raise ConfigError(
            f"training.batch_size={batch_size}: leaves one image for the last batch of "
            f"{len(dataset.train)} images, on which this model cannot train ({error}). Choose "
            f"another batch size"
        ) from error


def load_dataset(config: Config) -> data.Dataset:
    """The dataset that a config asks for, on the CPU."""
    asked = config.dataset
    return data.load(
        asked.name,
        root=asked.root,
        val_size=asked.val_size,
        train_size=asked.train_size,
        split_seed=asked.split_seed,
        classes=asked.classes,
        cache=configs.output_root() / "data",
    )


def _device(asked: str) -> torch.device:
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if asked == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if present[name]))
    device = torch.device(asked)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not present[device.type] or (device.index or 0) >= count:
        here = ", ".join(name for name, there in present.items() if there)
        raise ConfigError(f"training.device={asked}: it is not there. This machine has: {here}")
    return device


def _name(config: Config, choices: Mapping[Any, Any]) -> str:
    """What tells a run apart from others in a list: "mlp-64-32 sgd lr=0.1 bs=64 seed=0"."""
    hidden = config.model.get("hidden", [])
    layers = hidden if isinstance(hidden, list) else [hidden]
    model = "-".join([str(choices.get("model") or "model"), *map(str, layers)])
    parts = [model, str(choices.get("optimizer") or "optimizer")]
    if config.dataset.name != "mnist":
        parts.insert(0, config.dataset.name)
    if choices.get("schedule") not in (None, "constant"):
        parts.append(str(choices["schedule"]))
    lr = config.optimizer.get("lr")
    parts += [f"lr={lr:g}"] if isinstance(lr, int | float) else []
    return " ".join([*parts, f"bs={config.training.batch_size}", f"seed={config.seed}"])


def execute(job: Job, folder: Path, reporter: Reporter) -> Result:
    """Trains a job and keeps its record in `folder` and in MLflow, with its true status."""
    _check_folder(folder)
    store = Store(job.store_uri)
    experiment = store.experiment(job.config.tracking.experiment)
    try:
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(job.asked, folder / ".hydra" / "config.yaml")
        OmegaConf.save(job.composed.hydra, folder / ".hydra" / "hydra.yaml")
        OmegaConf.save(job.composed.hydra.overrides.task, folder / ".hydra" / "overrides.yaml")
        OmegaConf.save(job.asked, folder / "config.yaml", resolve=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the output folder cannot be written ({error.strerror}). "
            f"Choose another: hydra.run.dir=FOLDER"
        ) from error
    tracker = Tracker(store, experiment, job.name, _tags(job, folder))
    try:
        result = _run(job, folder, reporter, tracker)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        why = "interrupted" if interrupted else f"{type(error).__name__}: {error}"
        why = str(error) if isinstance(error, RunFailed) else why
        reporter.stop()
        tracker.finish("KILLED" if interrupted else "FAILED", why)
        raise
    tracker.finish("FINISHED")
    return result


def _check_folder(folder: Path) -> None:
    """Raises ConfigError for an output folder that cannot be made, as far as a look can tell."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ConfigError(
            f"{folder}: the output folder cannot be made, as {place} is not a folder that can be "
            f"written. Choose another: hydra.run.dir=FOLDER"
        )


def _run(job: Job, folder: Path, reporter: Reporter, tracker: Tracker) -> Result:
    config, dataset, stack = job.config, job.dataset, job.stack
    epochs, batch = config.training.epochs, config.training.batch_size
    _record_start(job, folder, tracker)
    reporter.start(f"run {tracker.run_id[:8]}  {job.name}  on {job.device}", epochs)

    history: list[dict[str, float]] = []
    best: dict[str, float] = {}
    every = config.tracking.image_every or -(-epochs // 20)
    run = training.Run(
        config.seed, job.optimizer_arguments, job.schedule, config.training.label_smoothing
    )
    failure = ""
    for record in training.fit(
        stack,
        dataset,
        [run],
        job.optimizer,
        epochs=epochs,
        batch_size=batch,
        compiled=_compiles(job),
    ):
        match record:
            case training.Notice():
                reporter.line(record.text)
                tracker.tags({"compiled": str(record.compiled).lower()})
            case training.Progress():
                reporter.progress(record)
            case training.Epoch() if record.failed:
                failure = record.failed[0]
            case training.Epoch():
                values = record.metrics[0]
                history.append({"epoch": record.epoch, **values})
                tracker.metrics(values, record.epoch)
                reporter.epoch(record.epoch, values)
                if dataset.val is not None:
                    if record.improved[0]:
                        accuracy = values["val/accuracy"]
                        best = {"best/val_accuracy": accuracy, "best/epoch": record.epoch}
                    if record.epoch % every == 0 or record.epoch == epochs:
                        _record_predictions(job, tracker, record.epoch)
    reporter.stop()

    model = stack.model(0)
    path = folder / "checkpoint.pt"
    checkpoint.save(path, {"model": model.state_dict(), "epochs": len(history)})
    for file in (path, path.with_name(path.name + ".sha256")):
        tracker.artifact(file, "checkpoint")
    if failure:
        _record_curves(history, None, None, job.name, folder, tracker)
        raise RunFailed(f"run {tracker.run_id[:8]} {failure}. Last finite weights: {path}")

    logits = training.predict(stack, dataset, dataset.test)
    test = training.score(logits, dataset.test, "test")[0] | best
    _record_test(job, logits[0], len(history), tracker)
    tracker.metrics(test, len(history))
    best_epoch = int(best["best/epoch"]) if best else None
    _record_curves(history, best_epoch, test["test/accuracy"], job.name, folder, tracker)
    served = Served(model, dataset.mean, dataset.std).eval()
    example = dataset.first.images[:2].cpu().numpy().astype(np.float32) / 255
    tracker.model(served, dataset.shape, len(dataset.classes), example)
    return Result(tracker.run_id, history, test, served, folder, job.store_uri)


def _compiles(job: Job) -> bool:
    asked = job.config.training
    if asked.compile != "auto":
        return asked.compile == "always"
    steps = asked.epochs * -(-len(job.dataset.train) // asked.batch_size)
    return training.compiling_pays(steps, job.device)


def _record_start(job: Job, folder: Path, tracker: Tracker) -> None:
    tracker.params(dict(configs.leaves(job.asked)))
    dataset = job.dataset
    sizes = {"train": len(dataset.train), "test": len(dataset.test)}
    if dataset.val is not None:
        sizes["val"] = len(dataset.val)
    facts = DatasetFacts(dataset.name, dataset.source, dataset.digest, dataset.shape, sizes)
    tracker.dataset(facts)
    tracker.artifact(folder / "config.yaml")
    if diff := _git("diff", "HEAD"):
        tracker.text(diff, "uncommitted.diff")
    tracker.image("train/first_30", plots.pixels(plots.grid(**_first(dataset))), 0)


def _record_predictions(job: Job, tracker: Tracker, epoch: int) -> None:
    val = job.dataset.val
    assert val is not None
    images, labels = val.images[:SHOWN], val.labels[:SHOWN]
    shares = job.stack.logits(job.dataset.normalise(images))[0].softmax(-1).cpu()
    pixels = _predictions(job, images, labels, shares, f"validation, epoch {epoch}")
    tracker.image("val/predictions", pixels, epoch)


def _record_test(job: Job, logits: torch.Tensor, epoch: int, tracker: Tracker) -> None:
    """The most confident mistakes and the confusion matrix. logits: [N, classes]."""
    dataset = job.dataset
    shares, true = logits.softmax(-1), dataset.test.labels.cpu()
    confidence, predicted = shares.max(-1)
    wrong = (predicted != true).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:SHOWN]
    if len(worst):
        title = f"most confident of {len(wrong)} mistakes on the test set"
        images = dataset.test.images.cpu()[worst]
        pixels = _predictions(job, images, true[worst], shares[worst], title)
        tracker.image("test/mistakes", pixels, epoch)
    counts = metrics.confusion(true, predicted, len(dataset.classes))
    figure = plots.confusion(counts, dataset.classes, "test set")
    tracker.image("test/confusion", plots.pixels(figure), epoch)


def _predictions(
    job: Job, images: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor, title: str
) -> np.ndarray:
    classes = job.dataset.classes
    confidence, predicted = shares.max(-1)
    figure = plots.grid(
        images[:, 0].cpu().numpy(),
        [classes[i] for i in labels.tolist()],
        [classes[i] for i in predicted.tolist()],
        confidence.tolist(),
        title=title,
    )
    return plots.pixels(figure)


def _record_curves(
    history: Sequence[Mapping[str, float]],
    best_epoch: int | None,
    test_accuracy: float | None,
    title: str,
    folder: Path,
    tracker: Tracker,
) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for values in history:
        for key, value in values.items():
            curves.setdefault(key, []).append((int(values["epoch"]), value))
    path = folder / "curves.png"
    plots.save(plots.curves(curves, best_epoch, title, test_accuracy=test_accuracy), path)
    tracker.artifact(path)


def _first(dataset: data.Dataset) -> dict[str, Any]:
    labels = [dataset.classes[i] for i in dataset.first.labels.tolist()]
    title = f"{dataset.name}: the first {len(labels)} images"
    return {"images": dataset.first.images[:, 0].cpu().numpy(), "labels": labels, "title": title}


def _git(*words: str) -> str:
    """What git says of the project's checkout; '' where there is none."""
    if not configs.IS_CHECKOUT:
        return ""
    try:
        answer = subprocess.run(
            ["git", *words], cwd=configs.project_root(), capture_output=True, check=False
        )
    except OSError:  # git is not installed
        return ""
    # a diff may hold bytes of any encoding
    return answer.stdout.decode(errors="replace").strip() if answer.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


def _tags(job: Job, folder: Path) -> dict[str, str]:
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "mnist-exp",
        "mlflow.source.type": "LOCAL",
        "command_line": shlex.join(sys.argv),
        "overrides": shlex.join(job.overrides),
        "config_hash": configs.identity(job.asked),
        "device": str(job.device),
        "threads": str(torch.get_num_threads()),
        "compiled": "false",
        "dataset": job.dataset.name,
        # a model that was not chosen from its group goes by its class
        "model": job.choices.get("model") or type(job.stack.module).__name__,
        "optimizer": job.choices.get("optimizer") or job.optimizer.__name__,
        "output_dir": str(folder.resolve()),
        "version.python": platform.python_version(),
        "version.torch": torch.__version__,
        "version.mnist_exp": __version__,
    }
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git_dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags | job.config.tracking.tags


def show(overrides: Sequence[str], output: Path | None) -> str:
    """Draws the dataset's first images to a PNG. Returns its facts and the path, to be printed."""
    config = configs.validate(configs.task_config(configs.compose(overrides)))
    path = output or configs.output_root() / "outputs" / f"{config.dataset.name}.png"
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--output {path}: must end in .png, .svg or .pdf")
    dataset = load_dataset(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.grid(**_first(dataset)), path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from error
    channels, height, width = dataset.shape
    val = f", {len(dataset.val):,} validation" if dataset.val is not None else ""
    return "\n".join(
        [
            f"dataset  {dataset.name} ({dataset.source})",
            f"images   {len(dataset.train):,} training{val}, {len(dataset.test):,} test",
            f"size     {channels} x {height} x {width}, 8 bits a pixel",
            f"classes  {len(dataset.classes)}: {', '.join(dataset.classes)}",
            f"pixels   mean {dataset.mean:.4f}, std {dataset.std:.4f} (training images, 0 to 1)",
            f"picture  {path}",
        ]
    )


@dataclass(frozen=True)
class Evaluation:
    """A saved model on the official test set."""

    run_id: str
    name: str
    test: dict[str, float]
    recorded: dict[str, float]  # what the run itself had found


def evaluate(store: Store, found: Any) -> Evaluation:
    """The saved model of a run, as `store.find` gives it, on the official test set."""
    with TemporaryDirectory() as folder:
        recorded = OmegaConf.load(store.fetch(found.info.run_id, "config.yaml", Path(folder)))
        path = store.fetch(found.info.run_id, "checkpoint", Path(folder)) / "checkpoint.pt"
        state = checkpoint.load(path)["model"]
    assert isinstance(recorded, DictConfig)
    config = configs.validate(recorded)
    dataset = load_dataset(config)
    stack = Stack(
        configs.build_model(config, dataset.shape, len(dataset.classes)),
        [config.seed],
        torch.device("cpu"),
    )
    shapes = [{n: t.shape for n, t in s.items()} for s in (state, stack.module.state_dict())]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"run {found.info.run_id}: its checkpoint does not fit {config.model['_target_']} as "
            f"it is now: the code has changed since"
        )
    # a buffer that is no part of the state is as the constructor made it
    stack.restore(stack.snapshot() | {name: tensor[None] for name, tensor in state.items()})
    test = training.score(training.predict(stack, dataset, dataset.test), dataset.test, "test")[0]
    known = {key: value for key, value in found.data.metrics.items() if key in test}
    return Evaluation(found.info.run_id, found.info.run_name, test, known)
