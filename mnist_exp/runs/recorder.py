"""The record of a run: its folder and its run in MLflow, from the first line to the last."""

import getpass
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from omegaconf import OmegaConf

from mnist_exp.config import paths
from mnist_exp.config.paths import IS_CHECKOUT
from mnist_exp.config.schema import identity, leaves
from mnist_exp.data import dataset as data
from mnist_exp.errors import ConfigError, RunFailed, reason_of
from mnist_exp.figures import samples, style
from mnist_exp.figures.curves import learning_curves
from mnist_exp.runs import saved_model as saved
from mnist_exp.runs.console import epoch_line
from mnist_exp.runs.job import Job
from mnist_exp.system import files
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.tracking.run_log import Beginning, RecordedDataset, RunWriter
from mnist_exp.tracking.store import save_model
from mnist_exp.training import metrics
from mnist_exp.training.events import Epoch, Message
from mnist_exp.training.models import DeployedModel
from mnist_exp.training.stack import Stack

log = logging.getLogger(__name__)

CURVES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")  # that are drawn of a run
FIRST_LOSSES = "first_losses"  # a tag
DIFF = "uncommitted.diff"  # an artifact
FIRST_STEPS = 8
LINE = 80  # characters that MLflow's page of a run has room for


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    run_id: str  # MLflow's, or, where MLflow does not have the run yet, the key of its record
    history: list[dict[str, float]]  # one dict an epoch, with the keys that MLflow has
    # test/loss and test/accuracy, unless the test is left for later; with a validation split
    # best/val_accuracy and best/epoch
    test: dict[str, float]
    model: torch.nn.Module  # on the CPU; takes images [B, C, H, W] with pixels from 0 to 1
    output_dir: Path
    store: str  # MLflow's tracking URI
    delivered: bool = False  # MLflow has all of it

    @property
    def test_accuracy(self) -> float:
        return self.test["test/accuracy"]


def write_configs(job: Job, folder: Path) -> None:
    was_there = folder.exists()
    try:
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        # the run is resumed from these two
        files.write(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(job.asked))
        own = OmegaConf.masked_copy(job.composed, "hydra")
        files.write(folder / ".hydra" / "hydra.yaml", OmegaConf.to_yaml(own))
        OmegaConf.save(job.composed.hydra.overrides.task, folder / ".hydra" / "overrides.yaml")
        OmegaConf.save(job.asked, folder / "config.yaml", resolve=True)
    except OSError as error:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"{folder}: the output folder cannot be written ({error.strerror}). "
            f"Choose another: hydra.run.dir=FOLDER"
        ) from error


def check_folder(folder: Path, key: str = "hydra.run.dir") -> None:
    """Raises ConfigError for an output folder that cannot be made, as far as a look can tell."""
    try:
        files.check_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the output folder cannot be made or written ({error.strerror}). Choose "
            f"another: {key}=FOLDER"
        ) from error


def check_vacant(folder: Path) -> None:
    """Raises ConfigError for a folder that holds the record of a run already."""
    if journal.size(folder) > 0:
        raise ConfigError(
            f"{folder}: it holds the record of a run already, which is not overwritten. Choose "
            f"another folder, or go on with that run: mnist-exp resume {folder}"
        )


class RunRecorder:
    """The record of one run while it is trained: in its folder, from where it goes to MLflow.

    In a folder that has the record of a run already, it goes on with that.
    `with record:` what goes wrong with the record of one run ends that run alone.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        tags: Mapping[str, str],
        diff: str,
        *,
        parent: Path | None,
        finished: bool,
    ) -> None:
        self.job, self.folder, self.diff, self.finished = job, folder, diff, finished
        beginning = Beginning(
            job.name,
            job.store_uri,
            job.config.tracking.experiment,
            _tags(job, folder, tags),
            parent,
        )
        self.writer = RunWriter(folder, job.open_runs, beginning)
        self.log = (folder / "train.log").open("a", encoding="utf-8", buffering=1)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.is_open = True
        self.outcome: Result | Exception = RunFailed("not trained")

    @classmethod
    def of_ended(cls, job: Job, folder: Path, *_: Any, **more: Any) -> Self:
        """Of a run that had ended before its stack was interrupted: nothing more comes."""
        record = cls.__new__(cls)
        record.job, record.folder, record.is_open = job, folder, False
        record.history, record.best = [], {}
        record.outcome = RunFailed("it had ended before")
        return record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):  # whatever a disk or a figure raises
            self.fail(error)
        return isinstance(error, Exception)

    def start(self, dataset: data.Dataset, stack: Stack, k: int) -> None:
        """Before training; the run is number k of the stack."""
        self.log.write(f"{self.job.name}  on {self.job.device}\n")
        self.writer.params(dict(leaves(self.job.asked)))
        sizes = {"train": len(dataset.train), "test": len(dataset.test)}
        if dataset.val is not None:
            sizes["val"] = len(dataset.val)
        facts = RecordedDataset(dataset.name, dataset.source, dataset.digest, dataset.shape, sizes)
        self.writer.dataset(facts)
        self.writer.artifact(self.folder / "config.yaml")
        if self.diff:
            self.writer.text(self.diff, DIFF)
        if self.finished:
            record_first(dataset, self.writer)
        if dataset.val is not None and self._image_every is not None:  # the UI's slider starts at 0
            record_predictions(stack.select([k]), dataset, self.writer, 0)

    @property
    def _image_every(self) -> int | None:
        """Epochs between two pictures of predictions; None: there are none."""
        every = self.job.config.tracking.image_every
        if every is None and self.finished:
            return -(-self.job.config.training.epochs // 20)  # about 20 pictures
        return every

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the record, as plain values."""
        return {"history": self.history, "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; what the journal has lost of its epochs is written again."""
        self.history, self.best = list(state["history"]), dict(state["best"])
        if not self.is_open:
            return
        self.log.write(f"resumed after epoch {len(self.history)}\n")
        for values in self.history:
            own = {key: value for key, value in values.items() if key != "epoch"}
            self.writer.metrics(own, int(values["epoch"]))

    def take(self, event: Message | Epoch, k: int, dataset: data.Dataset) -> None:
        """Takes in what `fit` has yielded, for run k of the stack."""
        if isinstance(event, Message):
            self.log.write(event.text + "\n")
            self.writer.tags({"compiled": str(event.compiled).lower()})
        else:
            self._epoch(event, k, dataset)

    def take_first(self, losses: np.ndarray) -> None:
        """The losses of the first steps, by which a run can be told from another one: later, what
        rounding has changed may have grown as large as what another seed changes."""
        first = [float(f"{loss:.9g}") for loss in losses[:FIRST_STEPS]]  # all digits of a float32
        self.writer.tags({FIRST_LOSSES: json.dumps(first)})

    def _epoch(self, event: Epoch, k: int, dataset: data.Dataset) -> None:
        if k in event.failed:
            path = self._save(event.model(k), dataset)
            self._curves()
            raise RunFailed(f"{event.failed[k]}. Last finite weights: {path}")
        if not (values := event.metrics[k]):
            return  # it has stopped before
        epoch, epochs = event.epoch, self.job.config.training.epochs
        self.history.append({"epoch": epoch, **values})
        self.log.write(epoch_line(epoch, epochs, values) + "\n")
        self.writer.metrics(values, epoch)
        if reason := event.stopped.get(k):
            self.log.write(f"stopped {reason}\n")
            self.writer.tags({"stopped": reason})
        if dataset.val is None:
            return
        if event.improved[k]:
            self.best = {"best/val_accuracy": values["val/accuracy"], "best/epoch": epoch}
        every = self._image_every
        if every is not None and (epoch % every == 0 or epoch == epochs or k in event.stopped):
            record_predictions(event.model(k), dataset, self.writer, epoch)

    def end(self, stack: Stack, dataset: data.Dataset) -> None:
        """The run is trained; `stack` has its model alone."""
        path = self._save(stack, dataset)
        epoch = len(self.history)
        self.writer.metrics(self.best, epoch)
        test, served = self.best, DeployedModel(stack.model(0), dataset.mean, dataset.std).eval()
        if self.finished:
            found = record_test(stack, dataset, self.writer, epoch)
            self._curves(found["test/accuracy"])
            record_model(served, dataset, self.writer, epoch)
            self.writer.metrics(found, epoch)
            test = found | self.best
        self.log.write("  ".join(f"{key} {value:.6g}" for key, value in test.items()) + "\n")
        uri = self.job.store_uri
        self.outcome = Result("", self.history, test, served, path.parent, uri)
        self.close("FINISHED")

    def fail(self, error: Exception) -> None:
        """The run alone ends here: FAILED, with the reason, and the traceback in its log."""
        self.outcome = error
        why = reason_of(error)
        bare = isinstance(error, RunFailed) and error.__cause__ is None
        try:
            self.writer.release_reserve()
            if not self.log.closed:
                self.log.write(why + "\n" if bare else "".join(traceback.format_exception(error)))
            self.close("FAILED", why)
        except Exception as second:  # the disk is the fault
            log.warning("%s: the end of the run is not recorded: %s", self.folder, second)
            self.is_open = False

    def leave(self) -> None:
        """Its files are closed, for another record to go on with it."""
        self.is_open = False
        self.log.close()
        self.writer.journal.close()

    def close(self, status: str, reason: str = "") -> None:
        """Nothing more comes after this."""
        if self.is_open:
            if status == "KILLED":
                self.log.write(f"{reason}\n")
            self.log.close()
            self.writer.artifact(self.folder / "train.log")
            self.writer.end(status, reason)
            self.is_open = False

    def _save(self, stack: Stack, dataset: data.Dataset) -> Path:
        path = self.folder / "checkpoint.pt"
        kept = saved.state(stack, dataset.info)
        checkpoint.save(path, {**kept, "epochs": len(self.history)})
        for file in (path, path.with_name(path.name + ".sha256")):
            self.writer.artifact(file, "checkpoint")
        return path

    def _curves(self, test_accuracy: float | None = None) -> None:
        curves: dict[str, list[tuple[int, float]]] = {}
        for values in self.history:
            for key, value in values.items():
                curves.setdefault(key, []).append((int(values["epoch"]), value))
        record_curves(
            curves, self.best.get("best/epoch"), self.job.name, test_accuracy, self.writer
        )


def record_curves(
    history: Mapping[str, Sequence[tuple[int, float]]],
    best_epoch: float | None,
    name: str,
    test_accuracy: float | None,
    writer: RunWriter,
) -> None:
    """Loss and accuracy over the epochs. history: metric -> (epoch, value)."""
    path = writer.folder / "curves.png"
    best = None if best_epoch is None else int(best_epoch)
    style.save(learning_curves(history, best, name, test_accuracy), path)
    writer.artifact(path)


def record_model(
    served: DeployedModel, dataset: data.Dataset, writer: RunWriter, epoch: int
) -> None:
    """The model, as MLflow keeps and serves it, and a picture of its first layer."""
    if (layer := samples.first_layer(served.model, dataset.shape)) is not None:
        writer.image("model/first_layer", style.pixels(layer), epoch)
    example = dataset.preview.images[:2].cpu().numpy().astype(np.float32) / 255
    path = writer.folder / "model"
    save_model(path, served, dataset.shape, len(dataset.classes), example)
    writer.model(path)


def record_first(dataset: data.Dataset, writer: RunWriter) -> None:
    """The first 30 images with their labels."""
    writer.image("train/first_30", style.pixels(samples.first_images(dataset)), 0)


def record_test(
    stack: Stack, dataset: data.Dataset, writer: RunWriter, epoch: int
) -> dict[str, float]:
    """The official test set, once: pictures of the mistakes and of the confusion matrix.

    Returns the metrics, which are yet to be recorded: they say that all of this is done.
    """
    logits = metrics.predict(stack, dataset, dataset.test)
    for name, figure in samples.test_figures(dataset, logits[0]).items():
        writer.image(f"test/{name}", style.pixels(figure), epoch)
    (test,) = metrics.score(logits, dataset.test, "test")
    return test


def record_predictions(stack: Stack, dataset: data.Dataset, writer: RunWriter, epoch: int) -> None:
    val = dataset.val
    assert val is not None
    images, labels = val.images[: data.PREVIEW_IMAGES], val.labels[: data.PREVIEW_IMAGES]
    shares = stack.logits(dataset.normalise(images))[0].softmax(-1).cpu()
    title = f"validation, epoch {epoch}" if epoch else "validation, before training"
    figure = samples.predictions(dataset, images, labels, shares, title)
    writer.image("val/predictions", style.pixels(figure), epoch)


def ask_git(*words: str) -> str:
    """What git says of the project's checkout; '' where there is none."""
    if not IS_CHECKOUT:
        return ""
    try:
        answer = subprocess.run(
            ["git", *words], cwd=paths.project_root(), capture_output=True, check=False
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


def provenance() -> dict[str, str]:
    """Tags that say where a run comes from; they are the same for every run of a process."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "mnist-exp",
        "mlflow.source.type": "LOCAL",
        "command_line": shlex.join(sys.argv),
        "version.python": platform.python_version(),
        "version.torch": torch.__version__,
        "version.numpy": np.__version__,  # whose generators decide the order of the data
        "version.mnist_exp": version("mnist-exp"),
    }
    if commit := ask_git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git_dirty"] = str(bool(ask_git("status", "--porcelain"))).lower()
    return tags


def _gpu(device: torch.device) -> dict[str, str]:
    """Which one it is, and what its numbers depend on; of a CPU, nothing."""
    if device.type != "cuda":
        return {}
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {"gpu": f"{torch.cuda.get_device_name(device)}, {versions}"}


def common_tags(job: Job, size: int) -> dict[str, str]:
    """Tags that the runs of a stack have in common."""
    return {
        **provenance(),
        "device": str(job.device),
        **_gpu(job.device),
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "compiled": "false",
        "stack_size": str(size),
        # a model that was not chosen from its group goes by its class
        "model": job.choices.get("model") or job.config.model["_target_"].rpartition(".")[2],
    }


def described(what: str, *words: str) -> dict[str, str]:
    """The description that MLflow's UI shows of a run: Markdown, and the command that leads on."""
    lines = ["mnist-exp train"]
    for word in map(shlex.quote, words):  # a long line would push aside what is beside it
        if len(lines[-1]) + len(word) < LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    command = " \\\n".join(lines)
    return {"mlflow.note.content": f"{what}\n\n```\n{command}\n```"}


def _tags(job: Job, folder: Path, facts: Mapping[str, str]) -> dict[str, str]:
    return {
        **facts,
        **described("To train it again:", *job.overrides),
        "overrides": shlex.join(job.overrides),
        "config_hash": identity(job.asked),
        "dataset": job.config.dataset.name,
        "optimizer": job.choices.get("optimizer") or job.optimizer.__name__,
        "choices": json.dumps(job.choices),
        "output_dir": str(folder.resolve()),
        **job.config.tracking.tags,
    }
