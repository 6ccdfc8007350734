"""What `evaluate` keeps of a run: the class that its model says of each test image.

It is kept in outputs/evaluations/, as JSON that needs no torch to read, for `compare`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from mnist_exp.config import paths
from mnist_exp.system import files

NAME = "predictions.json"


@dataclass(frozen=True)
class KeptPredictions:
    """The labels of the official test images, and what the model of a run says of each."""

    run_id: str
    dataset_digest: str  # the SHA-256 of the data
    classes: Sequence[str]
    labels: Sequence[int]  # from 0, in the order of the test set
    predicted: Sequence[int]
    store: str = ""  # the URI of the store that has the run; "" where that was not kept

    def save(self) -> Path:
        """Write them to the folder of the run's evaluation, and return the file. Raise OSError."""
        path = evaluation_folder(self.run_id) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(asdict(self), separators=(",", ":")))
        return path

    @classmethod
    def load(cls, run_id: str) -> Self | None:
        """Return what is kept of a run; None where there is nothing that can be read."""
        kept = cls.read(evaluation_folder(run_id))
        # two ids can begin alike, and so share a folder
        return kept if kept is not None and kept.run_id == run_id else None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what is kept in a folder; None where there is nothing that can be read."""
        try:
            kept = cls(**json.loads((folder / NAME).read_text(encoding="utf-8")))
            is_whole = len(kept.labels) == len(kept.predicted) > 0 and len(kept.classes) > max(
                *kept.labels, *kept.predicted
            )
        except (OSError, ValueError, TypeError):
            return None
        return kept if is_whole else None

    def has_images_of(self, other: "KeptPredictions") -> bool:
        """Return whether both are predictions for the same test images."""
        return self.dataset_digest == other.dataset_digest and self.labels == other.labels


def evaluation_folder(run_id: str) -> Path:
    """Return where the evaluation of a run is kept."""
    return paths.output_root() / "outputs" / "evaluations" / run_id[:8]
