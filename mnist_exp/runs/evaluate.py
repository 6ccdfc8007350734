"""The saved model of a run on the official test set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist_exp.data.dataset import Dataset
from mnist_exp.figures import curves, samples, style
from mnist_exp.figures.curves import History
from mnist_exp.formatting import Table, number_or_dash
from mnist_exp.runs import saved_model as saved
from mnist_exp.runs.recorder import CURVES
from mnist_exp.system import files
from mnist_exp.tracking.store import Store, StoredRun
from mnist_exp.training import metrics
from mnist_exp.training.metrics import Calibration, ClassScore
from mnist_exp.training.stack import Stack


@dataclass(frozen=True)
class Evaluation:
    """What a model says of the official test set."""

    run_id: str
    name: str
    dataset: Dataset = field(repr=False)
    logits: Tensor = field(repr=False)  # [N, classes]
    recorded: Mapping[str, float] = field(default_factory=dict)  # what the run itself had found
    model: nn.Module | None = field(default=None, repr=False)  # None: it is several
    history: History = field(default_factory=dict, repr=False)  # of its training
    best_epoch: int | None = None  # whose weights these are, if validation chose them

    @cached_property
    def test(self) -> dict[str, float]:
        """test/loss and test/accuracy."""
        (found,) = metrics.score(self.logits[None], self.dataset.test, "test")
        return found

    @property
    def interval(self) -> tuple[float, float]:
        """That the accuracy lies in, by 95 %: Wilson's."""
        return metrics.wilson(int(self._correct.sum()), len(self._correct))

    @property
    def classes(self) -> list[ClassScore]:
        """Precision, recall and F1 of each."""
        true, predicted = self.dataset.test.labels, self.logits.argmax(-1)
        return metrics.class_scores(metrics.confusion(true, predicted, len(self.dataset.classes)))

    @cached_property
    def calibration(self) -> Calibration:
        """How well its confidence says how often it is right."""
        return metrics.calibration(self.logits.double().softmax(-1).amax(-1), self._correct)

    @property
    def _correct(self) -> Tensor:
        return self.logits.argmax(-1) == self.dataset.test.labels

    def table(self) -> Table:
        """A row a class."""
        rows = [
            [
                name,
                *(number_or_dash(score, ".2%") for score in (one.precision, one.recall, one.f1)),
                str(one.images),
            ]
            for name, one in zip(self.dataset.classes, self.classes, strict=True)
        ]
        return ["class", "precision", "recall", "F1", "images"], rows

    def draw(self) -> dict[str, Any]:
        """Figures by name: of the test set, and of one model also how it was trained, and what its
        first layer looks for."""
        own = self.calibration
        title = "calibration on the test set"
        figures = samples.test_figures(self.dataset, self.logits)
        figures["calibration"] = curves.reliability_diagram(
            own.confidence, own.accuracy, own.counts, own.error, title
        )
        if self.history:
            test = self.recorded.get("test/accuracy")
            figures["curves"] = curves.learning_curves(
                self.history, self.best_epoch, self.name, test
            )
        layer = self.model and samples.first_layer(self.model, self.dataset.shape)
        if layer is not None:
            figures["first_layer"] = layer
        return figures


def evaluate(store: Store, run: StoredRun, root: str | None = None) -> Evaluation:
    """The saved model of a run on the official test set.

    root: where its data is by now, if not where it was. Raises ConfigError where the run has left
    no model.
    """
    dataset, stack = saved.load_run(store, run, root=root)
    history = {key: store.history(run.id, key) for key in CURVES}
    best = run.metrics.get("best/epoch")
    return evaluate_stack(
        run,
        dataset,
        stack,
        model=stack.model(0),
        history=history,
        best_epoch=None if best is None else int(best),
    )


def evaluate_stack(run: StoredRun, dataset: Dataset, stack: Stack, **more: Any) -> Evaluation:
    """Return what the one model in a stack, that of a run, says of the official test set."""
    (logits,) = metrics.predict(stack, dataset, dataset.test)
    saved.check_finite(logits, run)
    recorded = {key: value for key, value in run.metrics.items() if key.startswith("test/")}
    return Evaluation(run.id, run.name, dataset, logits, recorded, **more)


def save(figures: Mapping[str, Any], folder: Path, suffix: str) -> list[str]:
    """Writes figures into a folder, and returns the names of the files. Raises ConfigError."""
    with files.asked_for("--output", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            style.save(figure, folder / f"{name}.{suffix}")
    return [f"{name}.{suffix}" for name in figures]
