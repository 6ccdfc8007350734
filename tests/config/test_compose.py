"""Every choice composes and trains, and what is said beside it counts."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn, optim

from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import task_config
from mnist_exp.config.validate import validate
from mnist_exp.data import dataset as data
from mnist_exp.data.sources import DATASETS
from mnist_exp.errors import ConfigError
from mnist_exp.run import job
from mnist_exp.training.schedules import Constant
from tests.config.bad_input import Prepare
from tests.helpers import ROOT, tiny_dataset, write_idx
from tests.run.helpers import dataset_of, train_two_batches

CHOICES = sorted(
    f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}" for path in ROOT.glob("conf/*/*.yaml")
) + sorted(f"experiments={path.stem}" for path in ROOT.glob("experiments/*.yaml"))


def test_the_choices_are_found() -> None:
    groups = {choice.split("=")[0] for choice in CHOICES}
    needed = {"dataset", "augmentation", "model", "optimizer", "schedule", "training", "tracking"}
    assert groups == needed | {"debug", "experiments"}


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes_and_trains(choice: str, prepare: Prepare) -> None:
    root = ["dataset.root=."] if choice == "dataset=idx" else []
    job = prepare([choice, *root])
    group, option = choice.split("=")
    assert job.choices[group] == option
    if group == "dataset":
        assert job.config.dataset.name == option
    train_two_batches(job)


def test_every_dataset_is_a_choice() -> None:
    assert {f"dataset={name}" for name in (*DATASETS, "idx")} <= set(CHOICES)


def test_data_are_loaded_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **arguments: Any) -> data.Dataset:
        asked.update(arguments, name=name)
        return tiny_dataset(20)

    monkeypatch.setattr(data, "load", load)
    words = ["dataset=idx", "dataset.root=/some/folder", "dataset.val_size=7"]
    words += ["dataset.train_size=9", "dataset.split_seed=3", "dataset.classes=[a,b]"]
    job.load_dataset(validate(task_config(compose(words))).dataset)
    assert asked == {
        "name": "idx",
        "root": "/some/folder",
        "val_size": 7,
        "train_size": 9,
        "split_seed": 3,
        "classes": ["a", "b"],
        "cache": paths.output_root() / "data",
    }


def test_seed_recipe_is_what_it_was(prepare: Prepare) -> None:
    job = prepare(["experiments=seed_mlp"])
    config = job.config
    layers = list(job.build().children())
    assert [type(m) for m in layers] == [
        *(nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear)
    ]
    sizes = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    assert sizes == [(784, 64), (64, 32), (32, 10)]
    assert job.optimizer is optim.SGD
    assert job.optimizer_arguments == {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    assert job.schedule == Constant(warmup_epochs=0.0)
    assert (config.training.epochs, config.training.batch_size) == (100, 64)
    assert config.training.label_smoothing == 0
    assert (config.dataset.name, config.dataset.val_size, config.dataset.train_size) == (
        *("mnist", 0, None),
    )
    assert config.seed == 0


@pytest.mark.parametrize("model", ["mlp", "linear", "lenet5", "cnn", "cnn_pooled", "resnet"])
def test_sizes_follow_from_the_dataset(model: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "letters", size=32, classes=26, count=130)
    words = ["dataset=idx", f"dataset.root={folder}", "dataset.val_size=0", f"model={model}"]
    job = prepare(words, real=True)
    dataset = dataset_of(job)
    assert dataset.shape == (1, 32, 32)
    assert len(dataset.classes) == 26
    assert job.has_convolutions == (model not in ("mlp", "linear"))
    train_two_batches(job)


def test_group_beats_recipe_and_value_beats_group(prepare: Prepare) -> None:
    job = prepare(["optimizer.lr=0.5", "experiments=seed_mlp", "optimizer=adam", "debug=fast"])
    assert job.optimizer is optim.Adam
    assert job.optimizer_arguments["lr"] == 0.5
    assert (job.config.training.epochs, job.config.training.batch_size) == (2, 64)


def test_choice_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my conf" / "model").mkdir(parents=True)
    file = tmp_path / "my conf" / "model" / "wide.yaml"
    file.write_text("_target_: mnist_exp.training.models.MLP\nhidden: [256]\n")
    composed = compose(["model=wide"], config_dir=str(tmp_path / "my conf"))
    assert composed.model.hidden == [256]
    assert compose(["experiments=seed_mlp"], config_dir=str(tmp_path)).seed == 0
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        compose([], config_dir=str(tmp_path / "nowhere"))


def test_a_recipe_leaves_another_model_alone() -> None:
    """What the seed recipe says must not reach a model or an optimizer that replaces its own."""
    linear = validate(task_config(compose(["experiments=seed_mlp", "model=linear"])))
    assert linear.model["hidden"] == []
    adam = validate(task_config(compose(["experiments=seed_mlp", "optimizer=adam"])))
    assert adam.optimizer["lr"] == 1e-3


def test_paths_begin_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["dataset=idx", "dataset.root=../images", "hydra.run.dir=here/run"])
    assert config.dataset.root == str(tmp_path.parent / "images")
    assert config.hydra.run.dir == str(tmp_path / "here" / "run")
    assert compose(["dataset.root='~/images'"]).dataset.root == str(Path.home() / "images")
    absolute = compose(["dataset.root=${oc.env:HOME}", "hydra.run.dir=/a"])
    assert (absolute.dataset.root, absolute.hydra.run.dir) == (str(Path.home()), "/a")
    assert compose([]).dataset.root is None
