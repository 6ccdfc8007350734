"""The recorder of a run: it writes what training yields to the run's folder and its journal."""

import contextlib
import json
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from mnist_exp.config import paths
from mnist_exp.config.schema import Config, leaves
from mnist_exp.data.dataset import PREVIEW_IMAGES, Dataset
from mnist_exp.errors import RunFailed, Terminated, reason_of
from mnist_exp.figures import samples, style
from mnist_exp.figures.curves import learning_curves
from mnist_exp.run import saved_model
from mnist_exp.run.build import augmentation_of
from mnist_exp.run.console import Reporter, epoch_line
from mnist_exp.run.job import Job, Load
from mnist_exp.run.model_export import recording_model
from mnist_exp.run.provenance import run_tags
from mnist_exp.run.usage import UsageMeter
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.kept_files import DIFF
from mnist_exp.tracking.run_log import OpenRuns, RunWriter, open_runs_at
from mnist_exp.training import metrics
from mnist_exp.training.events import Epoch, Message, Progress
from mnist_exp.training.models import DeployedModel
from mnist_exp.training.stack import Stack

log = logging.getLogger(__name__)
Event = Progress | Epoch | Message

THREADS = torch.get_num_threads()  # torch's choice, before any run makes its own
RUN_CURVES = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")  # that are drawn of a run
FINGERPRINT = "first_losses"  # a tag
FINGERPRINT_STEPS = 8


@dataclass(frozen=True)
class Result:
    """A finished run, as `train` returns it."""

    run_id: str  # MLflow's, or, where MLflow does not have the run yet, the key of its record
    history: list[dict[str, float]]  # one dict an epoch, with the keys that MLflow has
    # test/loss and test/accuracy, unless the test is deferred; with a validation split
    # best/val_accuracy and best/epoch
    test: dict[str, float]
    model: torch.nn.Module  # on the CPU; takes images [B, C, H, W] with pixels from 0 to 1
    output_dir: Path
    store: str  # MLflow's tracking URI
    uploaded: bool = False  # MLflow has all of it

    @property
    def test_accuracy(self) -> float:
        """The share of the official test set that the model classifies correctly."""
        return self.test["test/accuracy"]


@dataclass(frozen=True)
class StackPlan:
    """The runs that are trained together as a stack, and where their records go."""

    jobs: Sequence[Job]  # that can share a stack
    folders: Sequence[Path]  # of their records
    store_uri: str
    open_runs: OpenRuns  # the registry of the runs that the store does not have whole
    tags: Sequence[Mapping[str, str]] = ({},)  # of each run, beyond its own
    parent: Path | None = None  # the folder of the sweep that they belong to
    checkpoint_dir: Path | None = None  # of the stack, if it is not the first run's folder
    defer_test: bool = False  # leave the test set and the model to `record_deferred_test`
    threads: int = THREADS  # where the config does not say


class RunRecorder:
    """The recorder of one run of a stack while it is trained, until the run's end."""

    def __init__(
        self, plan: StackPlan, index: int, dataset: Dataset, tags: Mapping[str, str]
    ) -> None:
        """Begin the record of a run, or go on with the one that its folder holds.

        Args:
            plan: The stack that the run belongs to.
            index: The run's number in it.
            dataset: The data set of the stack.
            tags: The tags that the runs of the stack have in common.
        """
        self.plan, self.index, self.dataset = plan, index, dataset
        self.job, self.folder = plan.jobs[index], plan.folders[index]
        # first: once the record has begun, nothing is missing to end it
        self.log = (self.folder / "train.log").open("a", encoding="utf-8", buffering=1)
        try:
            self.writer = RunWriter.begin(
                self.folder,
                plan.open_runs,
                name=self.job.name,
                uri=plan.store_uri,
                experiment=self.job.config.tracking.experiment,
                tags=run_tags(self.job, self.folder, {**tags, **plan.tags[index]}),
                parent=plan.parent,
            )
        except BaseException:
            self.log.close()
            raise
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.usage = UsageMeter(self.job.device, self.job.config.tracking.system)
        self.is_open = True
        self.outcome: Result | Exception = RunFailed("not trained")

    @contextlib.contextmanager
    def failing_alone(self) -> Iterator[None]:
        """End this run as FAILED where the block raises, so that the other runs go on."""
        try:
            yield
        except OSError as error:
            self.fail(record_failure(self.folder, error))
        except Exception as error:  # whatever a figure or a model raises
            self.fail(error)

    def start(self, stack: Stack, diff: str) -> None:
        """Record what is known before training. `diff`: uncommitted changes of the code."""
        dataset, writer = self.dataset, self.writer
        self.log.write(f"{self.job.name}  on {self.job.device}\n")
        writer.params(dict(leaves(self.job.task_config)))
        writer.dataset(dataset.describe())
        writer.artifact(self.folder / "config.yaml")
        if diff:
            writer.text(diff, DIFF)
        if not self.plan.defer_test:
            record_preview(dataset, self.job.config, writer)
        if dataset.val is not None and self._image_every is not None:  # the UI's slider starts at 0
            record_predictions(stack.select([self.index]), dataset, writer, 0)

    @property
    def _image_every(self) -> int | None:
        """Epochs between two pictures of predictions; None: there are none."""
        every = self.job.config.tracking.image_every
        if every is None and not self.plan.defer_test:
            return math.ceil(self.job.config.training.epochs / 20)  # about 20 pictures
        return every

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the recorder, as plain values."""
        return {"history": self.history, "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, and write again what the journal has lost of its epochs."""
        self.history, self.best = list(state["history"]), dict(state["best"])
        self.log.write(f"resumed after epoch {len(self.history)}\n")
        for values in self.history:
            recorded = {key: value for key, value in values.items() if key != "epoch"}
            self.writer.metrics(recorded, int(values["epoch"]))

    def record(self, event: Event) -> None:
        """Record an event of `fit`. Raise RunFailed if it says that this run has diverged."""
        if isinstance(event, Progress):
            if event.epoch == 1 and event.step == len(event.losses):
                # `reproduce` tells runs apart by their first losses: later, what rounding has
                # changed may have grown as large as what another seed changes
                losses = event.losses[:FINGERPRINT_STEPS, event.active.index(self.index)]
                fingerprint = [float(f"{loss:.9g}") for loss in losses]  # all of a float32
                self.writer.tags({FINGERPRINT: json.dumps(fingerprint)})
        elif isinstance(event, Message):
            self.log.write(event.text + "\n")
            self.writer.tags({"compiled": str(event.compiled).lower()})
        elif self.index in event.failed:
            path = self._save_checkpoint(event.model(self.index))
            record_curves(RunHistory.of(self.folder), self.writer, self.best.get("best/epoch"))
            raise RunFailed(f"{event.failed[self.index]}. Last finite weights: {path}")
        elif event.metrics[self.index]:  # else it has stopped before
            self._record_epoch(event)

    def _record_epoch(self, event: Epoch) -> None:
        epoch, epochs = event.epoch, self.job.config.training.epochs
        values = event.metrics[self.index]
        self.history.append({"epoch": epoch, **values})
        self.log.write(epoch_line(epoch, epochs, values) + "\n")
        self.writer.metrics({**values, **self.usage.read()}, epoch)
        if reason := event.stopped.get(self.index):
            self.log.write(f"stopped {reason}\n")
            self.writer.tags({"stopped": reason})
        if self.dataset.val is None:
            return
        if event.improved[self.index]:
            self.best = {"best/val_accuracy": values["val/accuracy"], "best/epoch": epoch}
        every = self._image_every
        if every is not None and (epoch % every == 0 or epoch == epochs or reason):
            record_predictions(event.model(self.index), self.dataset, self.writer, epoch)

    def end(self, stack: Stack, reporter: Reporter) -> None:
        """End the run as FINISHED.

        Args:
            stack: Its trained model alone.
            reporter: Shows the result of the test before that is drawn and the model saved.
        """
        path = self._save_checkpoint(stack)
        self.writer.metrics(self.best, len(self.history))
        test = self.best
        if not self.plan.defer_test:
            logits, scores = read_test_set(stack, self.dataset)
            test = scores | self.best
            reporter.tested(test)
            reporter.announce("drawing figures, saving the model, uploading ...")
            record_test_and_model(stack, self.dataset, self.writer, logits, scores)
        self.log.write("  ".join(f"{key} {value:.6g}" for key, value in test.items()) + "\n")
        model = _deployed(stack, self.dataset)
        self.outcome = Result("", self.history, test, model, path.parent, self.plan.store_uri)
        self.close("FINISHED")

    def fail(self, error: Exception) -> None:
        """End the run as FAILED, with the reason, and the traceback of a bug in its log."""
        self.outcome = error
        reason = reason_of(error)
        is_expected = isinstance(error, RunFailed) and isinstance(
            error.__cause__, OSError | NoneType
        )
        lines = [f"{reason}\n"] if is_expected else traceback.format_exception(error)
        try:
            self.writer.release_reserve()
            with contextlib.suppress(OSError, ValueError):  # the disk may be the fault
                self.log.write("".join(lines))
                self.log.close()
            self.close("FAILED", reason)
        except Exception as second:  # the disk is the fault
            log.warning("%s: the end of the run is not recorded: %s", self.folder, second)
            self.is_open = False

    def detach(self) -> None:
        """Close the files with the run's record left open, for another recorder to go on with."""
        self.is_open = False
        with contextlib.suppress(OSError):  # of a full disk, which is why it is detached
            self.log.close()
        self.writer.journal.close()

    def close(self, status: str, reason: str = "") -> None:
        """End the record, unless it has ended: FINISHED, FAILED or KILLED."""
        if self.is_open:
            if status == "KILLED":
                self.log.write(f"{reason}\n")
            self.log.close()
            self.writer.artifact(self.folder / "train.log")
            self.writer.end(status, reason)
            self.is_open = False

    def _save_checkpoint(self, stack: Stack) -> Path:
        path = self.folder / "checkpoint.pt"
        state = saved_model.model_state(stack, self.dataset)
        checkpoint.save(path, {**state, "epochs": len(self.history)})
        for file in (path, path.with_name(path.name + ".sha256")):
            self.writer.artifact(file, "checkpoint")
        return path


def record_failure(folder: Path, error: OSError) -> RunFailed:
    """Return the failure of a run for a fault of the disk, or of whatever else holds its record."""
    return RunFailed(
        f"the record of the run cannot be written to {folder} ({error.strerror or error}). Once it "
        f"can be, go on: mnist-exp resume {folder}"
    )


def open_recorders(recorders: Sequence[RunRecorder]) -> list[RunRecorder]:
    """Return the recorders whose runs have not ended."""
    return [recorder for recorder in recorders if recorder.is_open]


@contextlib.contextmanager
def closing_on_error(recorders: Sequence[RunRecorder], stack_size: int) -> Iterator[None]:
    """End the records of a stack's open runs where the block raises.

    An interruption ends them as KILLED and is raised again. RunFailed, and whatever a run that is
    trained alone raises, ends them as FAILED with the error as their outcome. Any other error in a
    stack of several is raised and leaves the records open, for its runs to be tried in two halves.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        for recorder in open_recorders(recorders):
            with recorder.failing_alone():
                recorder.close("KILLED", "interrupted")
        raise
    except (Exception, SystemExit) as raised:  # a model can raise anything
        if isinstance(raised, SystemExit):
            text = f"the code of the run ended it: {type(raised).__name__}: {raised}"
            error: Exception = RunFailed(text)
            error.__cause__ = raised
        else:
            error = raised
        if stack_size > 1 and not isinstance(error, RunFailed):
            for recorder in open_recorders(recorders):
                recorder.detach()
            raise error from None  # it has its own cause
        for recorder in open_recorders(recorders):
            recorder.fail(error)
        if not recorders:
            raise


def _deployed(stack: Stack, dataset: Dataset) -> DeployedModel:
    """Return the model of a stack of one, with the normalisation of its images inside."""
    return DeployedModel(stack.model(0), dataset.mean, dataset.std).eval()


def record_deferred_test(folder: Path, load: Load) -> None:
    """Record the pictures, the test set and the model that were deferred for an ended run.

    Args:
        folder: The folder of the run.
        load: Loads its data set.
    """
    config, dataset, stack = saved_model.load_from_folder(folder, load)
    writer = RunWriter.reopen(folder, open_runs_at(paths.output_root()))
    history = RunHistory.of(folder)
    record_preview(dataset, config, writer)
    if dataset.val is not None:  # the weights are those of the best epoch
        epoch = int(history.newest().get("best/epoch") or history.epochs)
        record_predictions(stack, dataset, writer, epoch)
    record_test_and_model(stack, dataset, writer, *read_test_set(stack, dataset))
    writer.journal.close()


def read_test_set(stack: Stack, dataset: Dataset) -> tuple[Tensor, dict[str, float]]:
    """Evaluate a stack of one on the official test set, which is read here once for a run.

    Returns:
        The logits [images, classes], and test/loss and test/accuracy.
    """
    logits = metrics.predict(stack, dataset, dataset.test)
    (scores,) = metrics.score(logits, dataset.test, "test")
    return logits[0], scores


def record_test_and_model(
    stack: Stack, dataset: Dataset, writer: RunWriter, logits: Tensor, scores: dict[str, float]
) -> None:
    """Record a trained run's results on the official test set, its curves and its model.

    The scores are recorded last: they say that all this is done.

    Args:
        stack: The trained model, as a stack of one.
        dataset: The data set it was trained on.
        writer: The writer of the run's journal, which holds its epochs.
        logits: Of the test set, [images, classes].
        scores: test/loss and test/accuracy.
    """
    history = RunHistory.of(writer.folder)
    epoch = history.epochs
    model = _deployed(stack, dataset)
    with recording_model(model, dataset, writer):
        for name, figure in samples.draw_results(dataset, dataset.test, logits).items():
            writer.image(f"test/{name}", style.pixels(figure), epoch)
        best_epoch = history.newest().get("best/epoch")
        record_curves(history, writer, best_epoch, scores["test/accuracy"])
        if (layer := samples.first_layer(model.model, dataset.shape)) is not None:
            writer.image("model/first_layer", style.pixels(layer), epoch)
    writer.metrics(scores, epoch)


def record_curves(
    history: RunHistory,
    writer: RunWriter,
    best_epoch: float | None,
    test_accuracy: float | None = None,
) -> None:
    """Record a figure of loss and accuracy over the epochs, with a mark at the best one.

    Args:
        history: What the run has recorded.
        writer: The writer of its journal.
        best_epoch: The epoch whose weights are kept, if validation chose it.
        test_accuracy: The accuracy on the official test set, if it is known.
    """
    best = None if best_epoch is None else int(best_epoch)
    curves = {key: history.history(key) for key in RUN_CURVES}
    figure = learning_curves(curves, best, history.name, test_accuracy)
    path = writer.folder / "curves.png"
    style.save(figure, path)
    writer.artifact(path)


def record_preview(dataset: Dataset, config: Config, writer: RunWriter) -> None:
    """Record figures of the first 30 images with their labels, and of augmented ones, if any."""
    writer.image("train/first_30", style.pixels(samples.first_images(dataset)), 0)
    augmentation = augmentation_of(config)
    if augmentation.is_on:
        figure = samples.augmented_images(
            dataset, augmentation, config.seed, config.training.batch_size
        )
        writer.image("train/augmented", style.pixels(figure), 0)


def record_predictions(stack: Stack, dataset: Dataset, writer: RunWriter, epoch: int) -> None:
    """Record a figure of predictions for the first validation images.

    Args:
        stack: The model, as a stack of one.
        dataset: The data set, which has a validation split.
        writer: The writer of the run's journal.
        epoch: The number of epochs that the model has been trained for.
    """
    val = dataset.val
    assert val is not None
    images, labels = val.images[:PREVIEW_IMAGES], val.labels[:PREVIEW_IMAGES]
    probabilities = stack.logits(dataset.normalise(images))[0].softmax(-1).cpu()
    title = f"validation, epoch {epoch}" if epoch else "validation, before training"
    figure = samples.predictions(dataset, images, labels, probabilities, title)
    writer.image("val/predictions", style.pixels(figure), epoch)
