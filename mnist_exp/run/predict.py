"""The predictions of a run's model for image files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mnist_exp.data import photos
from mnist_exp.data.photos import Photo, UnreadableImage
from mnist_exp.run.saved_model import check_finite, load_model, views_of
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.training import metrics
from mnist_exp.training.views import Views

CLASSES = 3  # of a prediction, the most probable first
DRAWN = 60  # files in a figure; the memory would not do for the photos of all


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file, or the problem for which there is none."""

    file: Path
    run_name: str  # of the run whose model predicts
    # kept for the DRAWN first files
    photo: Photo | None = field(default=None, repr=False)
    classes: Sequence[tuple[str, float]] = ()  # the most probable three, with their probabilities
    problem: str = ""
    views: Views | None = None  # that were averaged over, in test-time augmentation

    @property
    def title(self) -> str:
        """The name of the run, and the views of the images, as the title of a figure or a table."""
        return f"{self.run_name}, {self.views.description}" if self.views else self.run_name

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as plain values for programs; probabilities from 0 to 1."""
        if self.problem:
            return {"file": str(self.file), "error": self.problem}
        named = [{"class": name, "probability": share} for name, share in self.classes]
        return {
            "file": str(self.file),
            **named[0],
            "next": named[1:],
            "tta": self.views is not None,
        }


def predict(
    store: Store, run: StoredRun, files: Sequence[Path], raw: bool, tta: bool = False
) -> list[Prediction]:
    """Return a prediction for each file, in their order.

    Args:
        store: The store that has the run.
        run: The run whose model predicts.
        files: Image files.
        raw: Take the files as they are, as they are no photographs of ink on paper.
        tta: Average over the views of each image that suit the run.

    Raises:
        ConfigError: The run has left no model, one that gives no numbers, or one whose images are
            too small to be shifted.
    """
    info, stack = load_model(store, run)
    views = views_of(run) if tta else None
    predictions: list[Prediction] = []
    shown = 0
    for file in files:
        try:
            photo = photos.read(file, info.shape[1:], raw)
        except UnreadableImage as problem:
            predictions.append(Prediction(file, run.name, problem=str(problem)))
            continue
        image = torch.from_numpy(photo.preprocessed)[None, None]  # [H, W] -> [1, 1, H, W]
        ((logits,),) = metrics.predict_batch(stack, info, image, views)  # [1, 1, classes]
        check_finite(logits, run)
        probabilities = logits.double().softmax(-1)
        best = probabilities.topk(min(CLASSES, len(probabilities)))
        names = [info.classes[i] for i in best.indices.tolist()]
        classes = list(zip(names, best.values.tolist(), strict=True))
        kept = photo if shown < DRAWN else None
        predictions.append(Prediction(file, run.name, kept, classes, views=views))
        shown += 1
    return predictions


def draw(predictions: Sequence[Prediction], title: str) -> Any:
    """Return a figure of the files, one or more of which were read, beside what the network saw."""
    from mnist_exp.figures import images  # half a second, for those who draw

    drawn = [
        images.PredictedPhoto(p.file.name, p.photo.original, p.photo.preprocessed, p.classes)
        for p in predictions
        if p.photo
    ]
    return images.predictions_figure(drawn, title, total=sum(not p.problem for p in predictions))
