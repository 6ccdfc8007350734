"""Metrics: exact over uneven batches, and against published or hand-made numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnist_exp.data.dataset import Split
from mnist_exp.errors import ConfigError
from mnist_exp.training import metrics
from mnist_exp.training.metrics import MetricSums
from mnist_exp.training.stack import Stack
from mnist_exp.training.views import Views
from tests.training.helpers import CPU, MakeDataset, dropping_cnn, fit, mlp, run, seeded


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("size", [1, 3])
def test_metrics_are_exact_over_uneven_batches(
    size: int, smoothing: float, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that stand still: 257 training images in batches of 64, the last of one."""
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 32)  # for 70 images 32, 32 and 6
    data = make_dataset(train=257, val=70)
    runs = [run(seed, lr=0.0, smoothing=smoothing) for seed in range(size)]
    trained = fit(mlp, data, runs, batch_size=64)
    assert trained.losses.shape == (5, size)
    for k in range(size):
        module = seeded(mlp, k)
        found = trained.epochs[0].metrics[k]
        for split, name, smooth in ((data.train, "train", smoothing), (data.val, "val", 0.0)):
            assert split is not None
            logits = module((split.images / 255 - data.mean) / data.std).detach().double()
            loss = F.cross_entropy(logits, split.labels, label_smoothing=smooth).item()
            correct = int((logits.argmax(1) == split.labels).sum())
            assert found[f"{name}/loss"] == pytest.approx(loss, rel=1e-6)
            assert found[f"{name}/accuracy"] == correct / len(split)
        # what the mean over batches would have been is another number
        assert abs(trained.losses[:, k].mean() / found["train/loss"] - 1) > 1e-4


def test_sums_keep_what_float32_would_lose() -> None:
    sums = MetricSums.zeros(2)
    small = np.array([0.1, 0.2], dtype=np.float32)
    sums.add(np.array([2.0**24, 2.0**24], dtype=np.float32), np.array([1, 2]), 3)
    for _ in range(1000):
        sums.add(small, np.array([0, 1]), 1)
    total = [2**24 + 1000 * float(v) for v in small]
    means = sums.means("x")
    assert [m["x/loss"] for m in means] == pytest.approx([t / 1003 for t in total], rel=1e-12)
    assert [m["x/accuracy"] for m in means] == [1 / 1003, 1002 / 1003]


def test_class_scores() -> None:
    counts = np.array([[8, 2, 0, 0], [1, 4, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    first, second, missed, absent = metrics.class_scores(counts)
    assert (first.precision, first.recall, first.images) == (8 / 14, 0.8, 10)
    assert first.f1 == pytest.approx(2 / (14 / 8 + 1 / 0.8))
    assert (second.precision, second.recall) == (4 / 6, 0.8)
    assert math.isnan(missed.precision) and (missed.recall, missed.f1) == (0, 0)
    assert math.isnan(absent.recall) and math.isnan(absent.f1) and absent.images == 0


def test_calibration() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([True, True, True, False, True, False])
    found = metrics.calibration(confidence, correct, bins=10)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 4]
    assert found.accuracy[[5, 9]].tolist() == [0.5, 0.75]
    assert found.confidence[[5, 9]] == pytest.approx([0.55, 0.95], abs=1e-6)
    assert np.isnan(found.accuracy[0])
    assert found.error == pytest.approx((2 * 0.05 + 4 * 0.2) / 6, abs=1e-6)


def test_calibration_at_the_edges() -> None:
    found = metrics.calibration(torch.tensor([0.0, 0.5, 1.0]), torch.ones(3) > 0, bins=2)
    assert found.counts.tolist() == [2, 1]


def test_images_are_shifted_by_one_pixel_each_way() -> None:
    images = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    same, left, right, up, down = (moved[0, 0].tolist() for moved in Views().of(images))
    assert same == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert left == [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]]
    assert right == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]
    assert up == [[5, 6, 7, 8], [9, 10, 11, 12], [0, 0, 0, 0]]
    assert down == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    both = [view[0, 0].tolist() for view in Views(mirrored=True).of(images)]
    shifted = [same, left, right, up, down]
    assert both[::2] == shifted
    assert both[1::2] == [[row[::-1] for row in view] for view in shifted]


def test_test_time_augmentation_averages_probabilities(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models, in batches of 32, 32 and 6, as a plain loop would do it."""
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 32)
    data = make_dataset(train=257, val=70)
    assert data.val is not None
    found = metrics.predict(Stack(dropping_cnn, [0, 1], CPU), data, data.val, Views())
    plain = metrics.predict(Stack(dropping_cnn, [0, 1], CPU), data, data.val)
    assert not torch.allclose(found.softmax(-1), plain.double().softmax(-1), atol=1e-3)
    padded = F.pad(data.val.images / 255, (1, 1, 1, 1))
    for k in range(2):
        module, shares = seeded(dropping_cnn, k).eval(), []
        for y, x in ((1, 1), (1, 0), (1, 2), (0, 1), (2, 1)):
            moved = padded[:, :, y : y + 8, x : x + 8]
            shares.append(module((moved - data.mean) / data.std).detach().double().softmax(-1))
        expected = torch.stack(shares).mean(0)
        torch.testing.assert_close(found[k].exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("height, width", [(2, 8), (8, 2), (1, 1)])
def test_images_that_a_shift_would_empty_are_refused(
    height: int, width: int, make_dataset: MakeDataset
) -> None:
    split = Split(torch.zeros(4, 1, height, width, dtype=torch.uint8), torch.zeros(4).long())
    stack, data = Stack(mlp, [0], CPU), make_dataset(train=8, val=8)
    with pytest.raises(ConfigError, match=rf"^--tta: images of {height} x {width} pixels are too"):
        metrics.predict(stack, data, split, Views())
