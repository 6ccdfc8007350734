"""Saved models on the test set and on validation: exact numbers, and their figures."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.config import paths
from mnist_exp.errors import ConfigError
from mnist_exp.run.evaluate import Evaluation
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.run.recorder import Result
from mnist_exp.run.saved_model import load_model, load_run
from mnist_exp.tracking.store import Store
from mnist_exp.training import metrics
from mnist_exp.training.views import Views
from tests.helpers import config_on_record, write_idx

SMALL = [
    *("debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"),
    "tracking.image_every=100",
]


@pytest.fixture(scope="module")
def run(store: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("a run")
    return mnist_exp.train([*SMALL, f"tracking.uri={store}", f"hydra.run.dir={folder}/run"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the output folders, for what an evaluation keeps."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def found(run: Result, store: str, outputs: Path) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "output_root", lambda: outputs)
        return mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"])


def test_numbers_are_those_of_the_run(run: Result, found: Evaluation) -> None:
    recorded = {key: run.test[key] for key in ("test/loss", "test/accuracy")}
    assert found.scores == recorded == found.recorded
    low, high = found.interval
    assert low < found.scores["test/accuracy"] < high


def test_predictions_are_kept(
    run: Result, found: Evaluation, outputs: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: outputs)
    kept = KeptPredictions.load(run.run_id)
    assert kept == replace(found.predictions(), store=store)
    right = [true == said for true, said in zip(kept.labels, kept.predicted, strict=True)]
    assert sum(right) / len(right) == found.scores["test/accuracy"]
    assert kept.dataset_digest == found.dataset.digest and len(kept.classes) == 10


def test_predictions_that_cannot_be_kept_do_not_matter(
    run: Result, found: Evaluation, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "outputs").write_text("a file where the folder has to be")
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    assert mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"]).scores == found.scores
    assert "the predictions cannot be kept" in caplog.text


def test_numbers_agree_with_each_other(found: Evaluation) -> None:
    accuracy, images = found.scores["test/accuracy"], len(found.dataset.test)
    assert sum(one.images for one in found.classes) == images
    hits = sum(one.recall * one.images for one in found.classes)
    assert hits / images == pytest.approx(accuracy)
    own = found.calibration
    assert own.counts.sum() == images
    assert np.nansum(own.accuracy * own.counts) / images == pytest.approx(accuracy)
    assert 0 < own.error < 1


@pytest.fixture
def damaged(run: Result, store: str, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Changes what the store holds as the run's config.yaml, and puts it back."""
    with config_on_record(store, run.run_id, tmp_path) as (_, put):
        yield put


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "seed has no value"),
        (b"- a\n- b\n", "it holds no keys with their values"),
        (b"a: [b\n", "it cannot be read as YAML"),
        (b"\xff\xfe\x00", "it cannot be read as YAML"),
        (b"just text\n", "just text: there is no such key"),
        (b"seed: 1\n", "trusted_packages has no value"),
        (b"seed: 1\nmodel: ${nothing}\n", "Interpolation key 'nothing' not found"),
    ],
)
def test_damaged_config(
    content: bytes, said: str, damaged: Callable[[bytes], None], run: Result, store: str
) -> None:
    damaged(content)
    there = [f"tracking.uri={store}"]
    uses: list[Callable[[], object]] = [
        lambda: mnist_exp.evaluate(run.run_id, there),
        lambda: mnist_exp.predict(["a.png"], run.run_id, there),
        lambda: mnist_exp.reproduce(run.run_id, there),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match=rf"^run {run.run_id}, config\.yaml in.*({said})"):
            use()


def test_a_text_is_not_a_list(store: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: mnist_exp.load("dataset=mnist"),
        lambda: mnist_exp.build("model=cnn"),
        lambda: mnist_exp.train("model=cnn"),
        lambda: mnist_exp.train_sweep("seed=0,1"),
        lambda: mnist_exp.evaluate("last", f"tracking.uri={store}"),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match=r"^overrides: must be a list, as in \['"):
            use()
    with pytest.raises(ConfigError, match=r"^overrides: must be a list of texts, and is \[3\]"):
        mnist_exp.train([3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"^run: must be a text, as in 'last' or an id, and is 7"):
        mnist_exp.evaluate(7, [f"tracking.uri={store}"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^files: must be a list, as in \['a\.png'\]"):
        mnist_exp.predict("a.png", "last", [f"tracking.uri={store}"])


def test_a_class_that_is_never_predicted_has_no_precision(found: Evaluation) -> None:
    logits = found.logits.clone()
    logits[:, 3] = -1e9
    blind = replace(found, logits=logits)
    rows = blind.table()[1]
    assert rows[3][:4] == ["3", "-", "0.00%", "0.00%"]
    assert len(repr(blind)) < 500  # no screens of tensors


def test_what_is_on_record_is_not_overridden(run: Result, store: str) -> None:
    with pytest.raises(ConfigError, match=r"^seed=7: it would change nothing here"):
        mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}", "seed=7"])


def texts(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_figures(found: Evaluation) -> None:
    figures = found.draw()
    assert set(figures) == {"mistakes", "confusion", "calibration", "curves", "first_layer"}

    def written(name: str) -> str:
        return texts(figures[name])

    assert f"expected calibration error {found.calibration.error:.2%}" in written("calibration")
    assert f"{found.scores['test/accuracy']:.2%} right" in written("confusion")
    wrong = round(len(found.dataset.test) * (1 - found.scores["test/accuracy"]))
    assert f"most confident of {wrong} mistakes" in written("mistakes")
    assert f"best epoch {found.best_epoch}" in written("curves")
    assert "64 units" in written("first_layer")


def test_the_module_is_evaluated_as_it_is_served(run: Result, found: Evaluation) -> None:
    images = found.dataset.test.images.float() / 255
    with torch.no_grad():
        assert torch.allclose(run.model(images), found.logits, atol=1e-4)


def test_a_run_is_evaluated_and_reproduced_in_its_precision(
    store: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: folder)
    uri = f"tracking.uri={store}"
    words = [*SMALL, uri, f"hydra.run.dir={folder}/rounded", "training.precision=bfloat16"]
    result = mnist_exp.train(words)
    found = mnist_exp.evaluate(result.run_id, [uri])
    assert found.scores == found.recorded
    again = mnist_exp.reproduce(result.run_id, [uri])
    assert again.verdict.startswith("identical")
    _, model = load_model(Store(store), Store(store).get(result.run_id))
    images = torch.rand(32, 1, 28, 28)
    plain = model.model(0)(images).detach()
    assert not torch.equal(model.logits(images)[0], plain)
    torch.testing.assert_close(model.logits(images)[0], plain, rtol=0.1, atol=0.1)


def test_on_validation_the_numbers_are_those_of_the_best_epoch(
    run: Result, store: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: outputs / "validation")
    found = mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"], split="val")
    assert found.scores.keys() == {"val/loss", "val/accuracy"}
    assert found.scores["val/accuracy"] == run.test["best/val_accuracy"]
    assert found.dataset.val is not None and found.examples is found.dataset.val
    assert sum(one.images for one in found.classes) == len(found.dataset.val)
    assert found.calibration.counts.sum() == len(found.dataset.val)
    figures = found.draw()
    for name in ("mistakes", "confusion", "calibration"):
        assert "validation set" in texts(figures[name])
    assert "test" not in " ".join(map(texts, figures.values()))  # it is not looked at
    assert KeptPredictions.load(run.run_id) is None


def test_test_time_augmentation_leaves_the_plain_predictions_alone(
    run: Result, found: Evaluation, store: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: outputs)
    before = KeptPredictions.load(run.run_id)
    shifted = mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"], tta=True)
    assert shifted.predictions().predicted != found.predictions().predicted
    assert KeptPredictions.load(run.run_id) == before is not None
    assert shifted.recorded == found.recorded != shifted.scores
    for name in ("mistakes", "confusion", "calibration"):
        assert "test set, TTA over 5 shifts" in texts(shifted.draw()[name])


def test_mirror_images_are_views_of_a_run_that_was_trained_on_them(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    words = [*SMALL, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run"]
    mirrored = mnist_exp.train([*words, "augmentation=flip"])
    there = [f"tracking.uri={store}"]
    found = mnist_exp.evaluate(mirrored.run_id, there, tta=True)
    assert found.title == "test set, TTA over 5 shifts and mirror images"
    stack = load_run(Store(store), Store(store).get(mirrored.run_id))[1]
    expected = metrics.predict(stack, found.dataset, found.examples, Views(mirrored=True))
    torch.testing.assert_close(found.logits, expected[0])


def test_what_cannot_be_evaluated_is_refused(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_idx(tmp_path / "tiny", size=2, classes=2)
    words = [*SMALL, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run", "dataset=idx"]
    own = [f"dataset.root={root}", "dataset.train_size=null", "dataset.val_size=0"]
    run_id = mnist_exp.train([*words, *own]).run_id
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path / "nothing")
    image = tmp_path / "a.png"
    Image.new("L", (28, 28), 200).save(image)
    there = f"tracking.uri={store}"
    small = "--tta: images of 2 x 2 pixels are too small to be shifted by one"
    for typed, said in (
        (["evaluate", run_id, "--split", "val"], f"--split val: run {run_id} has no validation"),
        (["evaluate", run_id, "--tta"], small),
        (["predict", run_id, str(image), "--raw", "--tta"], small),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*typed, there])
        output = capsys.readouterr()
        assert output.err.startswith(f"mnist-exp: {said}") and output.out == ""
    with pytest.raises(ConfigError, match=r"^split=valid: must be one of test, val"):
        mnist_exp.evaluate(run_id, [there], split="valid")
    assert not (tmp_path / "nothing").exists()
