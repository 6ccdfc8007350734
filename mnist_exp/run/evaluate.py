"""The saved model of a run on the official test set, or on its validation split."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.errors import ConfigError
from mnist_exp.figures import curves, samples
from mnist_exp.figures.curves import History
from mnist_exp.formatting import Table, number_or_dash, wilson
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.run.recorder import RUN_CURVES
from mnist_exp.run.saved_model import check_finite, load_run, views_of
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.training import metrics
from mnist_exp.training.metrics import Calibration, ClassScore
from mnist_exp.training.stack import Stack
from mnist_exp.training.views import Views

SPLITS = {"test": "test set", "val": "validation set"}  # what can be evaluated on, with its title

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The results of a model, or of several together, on the images of a split."""

    run_id: str
    name: str
    dataset: Dataset = field(repr=False)
    examples: Split = field(repr=False)  # the images that these are the results on
    logits: Tensor = field(repr=False)  # [N, classes]
    split: str = "test"  # a key of SPLITS
    views: Views | None = None  # that were averaged over, in test-time augmentation
    recorded: Mapping[str, float] = field(default_factory=dict)  # the run's own test metrics
    model: nn.Module | None = field(default=None, repr=False)  # None for several models
    history: History = field(default_factory=dict, repr=False)  # of its training
    best_epoch: int | None = None  # whose weights these are, if validation chose them

    @cached_property
    def scores(self) -> dict[str, float]:
        """The loss and the accuracy by their names: test/loss and test/accuracy, or val/..."""
        (scores,) = metrics.score(self.logits[None], self.examples, self.split)
        return scores

    @property
    def title(self) -> str:
        """The split, and the views of its images, as the title of a figure."""
        return SPLITS[self.split] + (f", {self.views.description}" if self.views else "")

    @property
    def variant(self) -> str:
        """A name for what is not the plain model on the test set: "val", "tta" or "val-tta"."""
        names = "val" if self.split == "val" else "", "tta" if self.views else ""
        return "-".join(filter(None, names))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the accuracy."""
        return wilson(int(self._correct.sum()), len(self._correct))

    @property
    def classes(self) -> list[ClassScore]:
        """Precision, recall and F1 of each class."""
        labels, predicted = self.examples.labels, self.logits.argmax(-1)
        return metrics.class_scores(metrics.confusion(labels, predicted, len(self.dataset.classes)))

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration: how well the model's confidence tells how often it is right."""
        return metrics.calibration(self.logits.double().softmax(-1).amax(-1), self._correct)

    @property
    def _correct(self) -> Tensor:
        return self.logits.argmax(-1) == self.examples.labels

    def predictions(self) -> KeptPredictions:
        """Return the predicted class of each image, as those of the test set are kept."""
        return KeptPredictions(
            run_id=self.run_id,
            dataset_digest=self.dataset.digest,
            classes=list(self.dataset.classes),
            labels=self.examples.labels.tolist(),
            predicted=self.logits.argmax(-1).tolist(),
        )

    def table(self) -> Table:
        """Return the scores of the classes, one row a class."""
        rows = []
        for name, score in zip(self.dataset.classes, self.classes, strict=True):
            shares = (score.precision, score.recall, score.f1)
            rows.append([name, *(number_or_dash(s, ".2%") for s in shares), str(score.images)])
        return Table(["class", "precision", "recall", "F1", "images"], rows)

    def draw(self) -> dict[str, Any]:
        """Return figures by name: of the images, and of one model its curves and first layer."""
        figures = samples.draw_results(self.dataset, self.examples, self.logits, self.title)
        figures["calibration"] = curves.reliability_diagram(
            self.calibration, f"calibration: {self.title}"
        )
        if self.history:
            # who chooses by validation does not look at the test set
            test_accuracy = self.recorded.get("test/accuracy") if self.split == "test" else None
            figures["curves"] = curves.learning_curves(
                self.history, self.best_epoch, self.name, test_accuracy
            )
        if self.model is not None:
            layer = samples.first_layer(self.model, self.dataset.shape)
            figures |= {} if layer is None else {"first_layer": layer}
        return figures


def evaluate(
    store: Store,
    run: StoredRun,
    root: str | None = None,
    *,
    split: str = "test",
    tta: bool = False,
) -> Evaluation:
    """Return the results of a stored run's model on a split.

    What the plain model says of the official test set is kept for `compare`.

    Args:
        store: The store that has the run.
        run: The run.
        root: The folder of its data set, if not the recorded one.
        split: The images: "test" or "val".
        tta: Average over the views of each image that suit the run.

    Raises:
        ConfigError: The run has left no model, or its data set or the split is not there.
    """
    dataset, stack = load_run(store, run, root=root)
    best_epoch = run.metrics.get("best/epoch")
    evaluation = evaluate_stack(run, dataset, stack, split, tta)
    if not evaluation.variant:
        try:
            replace(evaluation.predictions(), store=store.uri).save()
        except OSError as error:  # the results are there all the same
            log.warning("the predictions cannot be kept, which compare needs: %s", error)
    return replace(
        evaluation,
        model=stack.model(0),
        history={key: store.history(run.id, key) for key in RUN_CURVES},
        best_epoch=None if best_epoch is None else int(best_epoch),
    )


def evaluate_stack(
    run: StoredRun, dataset: Dataset, stack: Stack, split: str, tta: bool
) -> Evaluation:
    """Return the results of a run's model, a stack of one, on a split of its data set."""
    if split not in SPLITS:
        raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
    examples = dataset.val if split == "val" else dataset.test
    if examples is None:
        raise ConfigError(
            f"--split val: run {run.id} has no validation images (dataset.val_size=0). For the "
            f"test set: --split test"
        )
    views = views_of(run) if tta else None
    (logits,) = metrics.predict(stack, dataset, examples, views)
    check_finite(logits, run)
    recorded = {key: value for key, value in run.metrics.items() if key.startswith("test/")}
    return Evaluation(run.id, run.name, dataset, examples, logits, split, views, recorded)
