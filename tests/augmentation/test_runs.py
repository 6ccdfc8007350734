"""Augmentation as people meet it: in the config, in pictures, in records, and in messages."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import mnist_exp
from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity, task_config
from mnist_exp.config.validate import likely_mistakes, validate
from mnist_exp.errors import ConfigError
from mnist_exp.figures import samples
from mnist_exp.figures.images import sample_grid
from mnist_exp.figures.style import pixels
from mnist_exp.run.build import augmentation_of
from mnist_exp.run.job import prepare
from mnist_exp.training.events import StackSpec
from mnist_exp.training.loop import fit
from mnist_exp.training.seeds import first_augmented, image_order, step_keys
from mnist_exp.training.stack import Batch, Stack
from mnist_exp.training.step import TrainStep
from tests.helpers import fresh_store, write_idx
from tests.training.helpers import CPU, MakeDataset, mlp, run

NAMES = ("none", "shift", "affine", "elastic", "erase", "mixup", "flip")


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_on_and_none_is_off(name: str) -> None:
    augmentation = augmentation_of(validate(task_config(compose([f"augmentation={name}"]))))
    assert augmentation.is_on == (name != "none")
    assert name in ("none", "affine") or getattr(augmentation, name) > 0


def test_values_compose_on_a_group() -> None:
    words = ["augmentation=affine", "augmentation.erase=4", "augmentation.shift=0"]
    augmentation = augmentation_of(validate(task_config(compose(words))))
    assert augmentation == Augmentation(rotation=12.0, scale=0.12, shear=8.0, erase=4)
    assert augmentation.describe() == "rotation=12 scale=0.12 shear=8 erase=4"


def test_a_record_from_before_stands_for_none() -> None:
    today = task_config(compose([]))
    before = today.copy()
    OmegaConf.set_struct(before, False)
    del before["augmentation"]
    assert not augmentation_of(validate(before.copy())).is_on
    assert identity(before) == identity(today)
    assert identity(task_config(compose(["augmentation=shift"]))) != identity(today)


@pytest.mark.parametrize("key, value", [("shift", "8.0"), ("erase", "8")])
def test_what_is_as_large_as_an_image_is_refused(key: str, value: str, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "small", size=8, classes=5, count=600)
    data = ["dataset=idx", f"dataset.root='{folder}'"]
    words = [*data, f"hydra.run.dir='{tmp_path}/run'", f"augmentation.{key}={value}"]
    message = (
        f"augmentation.{key}=8: must be below 8, as the images of idx have 8x8 pixels. "
        f"To leave it out: augmentation.{key}=0"
    )
    for refusing in (lambda: prepare(compose(words)), lambda: mnist_exp.show(words)):
        with pytest.raises(ConfigError) as caught:
            refusing()
        assert str(caught.value) == message
    prepare(compose([*words, f"augmentation.{key}=7"]))


def test_what_cannot_be_carried_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr("mnist_exp.augmentation.pixels.erase", fail)
    with pytest.raises(ConfigError, match=r"^augmentation: erase=8: not on this machine$"):
        prepare(compose(["debug=fast", "augmentation=erase"]))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_picture_is_of_what_a_run_trains_on_first(
    batch_size: int, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = make_dataset(), []
    gradients = Stack.gradients

    def record(own: Stack, params: Any, buffers: Any, batch: Batch) -> Any:
        seen.append(batch)
        return gradients(own, params, buffers, batch)

    monkeypatch.setattr(Stack, "gradients", record)
    monkeypatch.setattr(TrainStep, "_traced", lambda own, steps, *rest: steps)
    settings = Augmentation(elastic=0.8, mixup=0.5)
    spec = StackSpec(torch.optim.SGD, 1, batch_size, settings)
    next(iter(fit(Stack(mlp, [5], CPU), data, [run(5)], spec)))
    given = first_augmented(data, settings, 5, batch_size, 30)
    assert given.others is not None and given.shares is not None
    for name in ("x", "y", "others", "shares"):
        trained_on = torch.cat([getattr(batch, name) for batch in seen], 1)[:, :30]
        torch.testing.assert_close(getattr(given, name), trained_on)


def test_what_is_drawn_are_the_pixels(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset()
    drawn: dict[str, Any] = {}

    def record(images: np.ndarray, labels: list[str], **more: Any) -> Any:
        drawn.update(images=images, labels=labels, **more)
        return sample_grid(images, labels, **more)

    monkeypatch.setattr(samples, "sample_grid", record)
    figure = samples.augmented_images(data, Augmentation(flip=1.0), 5, 64)
    chosen = image_order(5, 0, 300)[:30]
    assert np.array_equal(drawn["images"], data.train.images[chosen, 0].flip(-1).numpy())
    assert drawn["labels"] == [data.classes[i] for i in data.train.labels[chosen].tolist()]
    assert (drawn["note"], drawn["second_lines"]) == ("flip=1", None)
    assert pixels(figure).std() > 10
    samples.augmented_images(data, Augmentation(mixup=1.0), 5, 64)
    before = data.train.labels[image_order(5, 0, 300)[:64].roll(1)].tolist()
    for text, other in zip(drawn["second_lines"], before, strict=False):
        assert text == "" or text.endswith(f"% {data.classes[other]}")


def test_the_keys_of_the_steps_are_what_records_were_made_with() -> None:
    """They decide what is drawn, of dropout as well."""
    expected = np.random.default_rng([3, 2, 1]).integers(2**31, size=4)
    assert step_keys(3, 1, 4).tolist() == expected.tolist()


def test_show_draws_what_a_run_would_get(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "data", size=8, classes=5, count=600)
    words = ["dataset=idx", f"dataset.root='{folder}'"]
    plain = mnist_exp.show(words)
    shown = mnist_exp.show([*words, "augmentation=shift"])
    assert {**shown.facts} == {**plain.facts, "augmentation": "shift=2"}
    other = mnist_exp.show([*words, "augmentation=shift", "seed=1"])
    pictures = [pixels(overview.figure) for overview in (plain, shown, other)]
    assert not np.array_equal(pictures[1], pictures[0])
    assert not np.array_equal(pictures[1], pictures[2])


def test_a_run_records_its_augmented_images(tmp_path: Path) -> None:
    uri = fresh_store(tmp_path)
    words = ["debug=fast", "training.epochs=1", "dataset.val_size=100", "training.compile=never"]
    words += [f"tracking.uri={uri}", f"hydra.run.dir={tmp_path}/run", "training.device=cpu"]
    result = mnist_exp.train([*words, "augmentation=elastic", "augmentation.mixup=0.2"])
    files = mlflow.MlflowClient(uri).list_artifacts(result.run_id, "images")
    names = {Path(file.path).name.split("+")[0] for file in files}
    assert names >= {"train~first_30", "train~augmented"}


def mistakes(*commands: str) -> list[str]:
    return likely_mistakes([validate(task_config(compose(words.split()))) for words in commands])


def test_mirrored_characters_are_told_from_clothes() -> None:
    clothes, own = "dataset=fashion_mnist", "dataset=idx dataset.root=."
    upright = "dataset=kmnist augmentation=elastic"
    assert mistakes(f"{clothes} augmentation=flip", f"{own} augmentation=flip", upright) == []
    letters = "dataset=emnist_letters augmentation=flip"
    assert mistakes(f"{clothes} augmentation=flip", letters, letters) == [
        "augmentation.flip=0.5: it mirrors the images of emnist_letters, and a mirrored digit or "
        "letter is another one, or none. To leave it out: augmentation.flip=0"
    ]


def test_each_warning_comes_once_a_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sweep as a whole, and again of the next one in the same process."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    words = ["debug=fast", "training.epochs=1", "training.compile=never", "training.device=cpu"]
    words += ["augmentation=flip", "training.precision=bfloat16", "model=linear"]
    words += [f"tracking.uri={fresh_store(tmp_path)}"]
    commands: list[Callable[[], object]] = [
        lambda: mnist_exp.train([*words, f"hydra.run.dir={tmp_path}/run"]),
        lambda: mnist_exp.train_sweep([*words, "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"]),
        lambda: mnist_exp.train([*words, f"hydra.run.dir={tmp_path}/again"]),
    ]
    for command in commands:
        caplog.clear()
        command()
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert [text.split(":")[0] for text in warnings] == [
            "augmentation.flip=0.5",
            "training.precision=bfloat16",
        ]
