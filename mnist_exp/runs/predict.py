"""What a run's model says of image files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_exp.data import photos
from mnist_exp.data.photos import Photo, UnreadableImage
from mnist_exp.figures import images
from mnist_exp.runs import saved_model as saved
from mnist_exp.tracking.store import Store, StoredRun

NAMED = 3  # classes, the most probable first


@dataclass(frozen=True)
class Prediction:
    """Of one file; `problem` says why there is none."""

    file: Path
    # of as many as a figure shows; of more, memory would not do
    photo: Photo | None = field(default=None, repr=False)
    classes: Sequence[tuple[str, float]] = ()  # the most probable three, with their probabilities
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """For programs; probabilities from 0 to 1."""
        if self.problem:
            return {"file": str(self.file), "error": self.problem}
        named = [{"class": name, "probability": share} for name, share in self.classes]
        return {"file": str(self.file), **named[0], "next": named[1:]}


def predict(store: Store, run: StoredRun, files: Sequence[Path], raw: bool) -> list[Prediction]:
    """One a file, in their order.

    raw: the files are taken as they are, for what is no photograph of ink on paper. Raises
    ConfigError where the run has left no model, or one that gives no numbers.
    """
    facts, stack = saved.load_model(store, run)
    predictions: list[Prediction] = []
    kept = 0
    for file in files:
        try:
            photo = photos.read(file, facts.shape[1:], raw)
        except UnreadableImage as problem:
            predictions.append(Prediction(file, problem=str(problem)))
            continue
        image = torch.from_numpy(photo.preprocessed)[None, None]  # [1, 1, H, W]
        logits = stack.logits(facts.normalise(image))[0, 0]
        saved.check_finite(logits, run)
        shares = logits.double().softmax(-1)
        best = shares.topk(min(NAMED, len(shares)))
        names = [facts.classes[i] for i in best.indices.tolist()]
        classes = list(zip(names, best.values.tolist(), strict=True))
        predictions.append(Prediction(file, photo if kept < images.PAIRS else None, classes))
        kept += 1
    return predictions


def draw(predictions: Sequence[Prediction], title: str) -> Any:
    """A figure of what was given, beside what the network saw.

    One file or more has to have been read.
    """
    drawn = [(p.photo, p.classes) for p in predictions if p.photo]
    return images.predictions_figure(
        [photo.original for photo, _ in drawn],
        np.stack([photo.preprocessed for photo, _ in drawn]),
        [classes for _, classes in drawn],
        title,
        names=[p.file.name for p in predictions if p.photo],
        of=sum(not p.problem for p in predictions),
    )
