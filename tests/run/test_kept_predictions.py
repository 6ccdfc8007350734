"""Predictions that are kept of an evaluation: read whole and of the right run, or not at all."""

from dataclasses import replace
from pathlib import Path

import pytest

from mnist_exp.config import paths
from mnist_exp.run.kept_predictions import NAME, KeptPredictions, evaluation_folder

KEPT = KeptPredictions("0123456789abcdef", "a digest", ["a", "b"], [0, 1, 1], [0, 1, 0])


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    return tmp_path


def test_what_is_saved_is_loaded(root: Path) -> None:
    assert KeptPredictions.load(KEPT.run_id) is None
    path = KEPT.save()
    assert path == root / "outputs" / "evaluations" / "01234567" / NAME
    assert KeptPredictions.load(KEPT.run_id) == KEPT


def test_a_run_whose_id_begins_alike_is_another_one() -> None:
    KEPT.save()
    assert KeptPredictions.load("01234567" + "0" * 8) is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{}", b"\xff", b'{"run_id": "0123456789abcdef"}'),
        b'{"run_id": "0123456789abcdef", "dataset_digest": "", "classes": ["a"], "labels": [0, 1],'
        b' "predicted": [0, 1]}',  # of a class that there is not
        b'{"run_id": "0123456789abcdef", "dataset_digest": "", "classes": ["a"], "labels": [0, 0],'
        b' "predicted": [0]}',
    ],
)
def test_what_is_damaged_is_not_there(content: bytes) -> None:
    KEPT.save()
    (evaluation_folder(KEPT.run_id) / NAME).write_bytes(content)
    assert KeptPredictions.load(KEPT.run_id) is None


def test_predictions_for_other_images_are_told_apart() -> None:
    assert KEPT.has_images_of(replace(KEPT, run_id="another", predicted=[1, 1, 1]))
    assert not KEPT.has_images_of(replace(KEPT, dataset_digest="another"))
    assert not KEPT.has_images_of(replace(KEPT, labels=[0, 1, 0]))
