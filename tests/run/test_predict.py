"""Predictions for files: those of the run's model, in their order, with the problems among them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mnist_exp
from mnist_exp.run import predict
from mnist_exp.run.evaluate import Evaluation
from mnist_exp.run.predict import Prediction
from mnist_exp.run.recorder import Result

SMALL = ["debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"]
COUNT = 6


@pytest.fixture(scope="module")
def run(store: str, folder: Path) -> Result:
    return mnist_exp.train([*SMALL, f"tracking.uri={store}", f"hydra.run.dir={folder}/run"])


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    """The first images of the test set, in the order of the test set, and a text among them."""
    paths = [folder / f"{i}.png" for i in range(COUNT)]
    test = mnist_exp.load(SMALL).test
    for path, image in zip(paths, test.images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    text = folder / "a text.png"
    text.write_text("no image")
    return [paths[0], text, *paths[1:]]


@pytest.fixture(scope="module")
def predictions(run: Result, store: str, files: list[Path]) -> list[Prediction]:
    return mnist_exp.predict(files, run.run_id, [f"tracking.uri={store}"], raw=True)


def test_predictions_are_those_of_the_evaluation(
    predictions: list[Prediction], run: Result, store: str
) -> None:
    evaluation = mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"])
    assert_predicted(predictions, evaluation)


def assert_predicted(predictions: list[Prediction], evaluation: Evaluation) -> None:
    expected = evaluation.logits[:COUNT].double().softmax(-1)
    made = [p for p in predictions if not p.problem]
    for prediction, shares in zip(made, expected, strict=True):
        best = shares.topk(3)
        assert [name for name, _ in prediction.classes] == [str(i) for i in best.indices.tolist()]
        np.testing.assert_allclose([share for _, share in prediction.classes], best.values, 1e-5)


def test_test_time_augmentation_is_that_of_the_evaluation(
    predictions: list[Prediction], run: Result, store: str, files: list[Path]
) -> None:
    there = [f"tracking.uri={store}"]
    made = mnist_exp.predict(files, run.run_id, there, raw=True, tta=True)
    assert_predicted(made, mnist_exp.evaluate(run.run_id, there, tta=True))
    assert made[0].classes != predictions[0].classes
    assert made[0].as_json()["tta"] is True
    title = f"{made[0].run_name}, TTA over 5 shifts"
    assert title in [text.get_text() for text in mnist_exp.predictions_figure(made).texts]


def test_a_file_that_cannot_be_read_is_a_problem_in_its_place(
    predictions: list[Prediction], files: list[Path]
) -> None:
    assert [p.file for p in predictions] == files
    assert [bool(p.problem) for p in predictions] == [False, True, *[False] * (COUNT - 1)]
    assert predictions[1].as_json() == {"file": str(files[1]), "error": predictions[1].problem}


def test_as_json_begins_with_the_most_probable_class(predictions: list[Prediction]) -> None:
    plain = predictions[0].as_json()
    assert plain.keys() == {"file", "class", "probability", "next", "tta"} and not plain["tta"]
    shares = [plain["probability"], *(other["probability"] for other in plain["next"])]
    assert shares == sorted(shares, reverse=True) and len(shares) == 3


def test_no_more_photos_are_kept_than_a_figure_shows(
    run: Result, store: str, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "DRAWN", 2)
    made = mnist_exp.predict(files, run.run_id, [f"tracking.uri={store}"], raw=True)
    assert [p.file for p in made if p.photo] == [files[0], files[2]]  # the text takes no place
    predict.draw(made, "a title")
