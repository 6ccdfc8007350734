"""Every choice composes and trains, and every wrong word is named in a message; no run is made."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mnist_exp.config import paths, schema
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import DatasetConfig, task_config
from mnist_exp.config.validate import validate
from mnist_exp.data import dataset as data
from mnist_exp.data.sources import DATASETS
from mnist_exp.errors import ConfigError
from mnist_exp.runs import job
from mnist_exp.runs.job import Job
from mnist_exp.training import loop, metrics
from mnist_exp.training.events import Epoch, Progress
from mnist_exp.training.schedules import Constant
from mnist_exp.training.stack import Stack
from tests.helpers import ROOT, tiny_dataset, write_idx

pytestmark = pytest.mark.usefixtures("one_thread")

Prepare = Callable[..., Job]
CHOICES = sorted(
    f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}" for path in ROOT.glob("conf/*/*.yaml")
) + sorted(f"experiments={path.stem}" for path in ROOT.glob("experiments/*.yaml"))
NO_ARGUMENTS = ["~model.hidden", "~model.dropout"]  # of the default model


@pytest.fixture
def prepare(tmp_path: Path) -> Iterator[Prepare]:
    """`job.prepare` on overrides, with a tiny data set; nothing may have been created at the end.

    `real`: with the data set that is asked for.
    """

    def call(overrides: Sequence[str], real: bool = False) -> Job:
        store = f"tracking.uri=sqlite:///{tmp_path}/store.db"
        composed = compose([store, f"hydra.run.dir={tmp_path}/run", *overrides])

        def small(asked: DatasetConfig) -> data.Dataset:
            return tiny_dataset(2 * composed.training.batch_size)

        return job.prepare(composed, None if real else small)

    yield call
    assert [path.name for path in tmp_path.iterdir() if path.name in ("store.db", "run")] == []


def dataset_of(job: Job) -> data.Dataset:
    return job.load(job.config.dataset)


def stack_of(job: Job) -> Stack:
    return Stack(job.build, [job.config.seed], job.device)


def train_two_batches(job: Job) -> None:
    """Trains and evaluates; the weights must change and everything be finite."""
    dataset, stack = dataset_of(job), stack_of(job)
    before = stack.snapshot()
    batch_size = -(-len(dataset.train) // 2)
    records = list(
        loop.fit(stack, dataset, [job.run_spec], job.optimizer, epochs=1, batch_size=batch_size)
    )
    progress = [r for r in records if isinstance(r, Progress)]
    assert progress[-1].step == progress[-1].steps == 2
    epoch = records[-1]
    assert isinstance(epoch, Epoch) and not epoch.failed
    after = stack.params
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    logits = metrics.predict(stack, dataset, dataset.test)
    assert logits.shape == (1, len(dataset.test), len(dataset.classes))


def test_the_choices_are_found() -> None:
    groups = {choice.split("=")[0] for choice in CHOICES}
    needed = {"dataset", "model", "optimizer", "schedule", "training", "tracking", "debug"}
    assert groups == needed | {"experiments"}


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
    assert job.optimizer is torch.optim.SGD
    assert job.optimizer_arguments == {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    assert job.schedule == Constant(warmup_epochs=0.0)
    assert (config.training.epochs, config.training.batch_size) == (100, 64)
    assert config.training.label_smoothing == 0
    assert (config.dataset.name, config.dataset.val_size, config.dataset.train_size) == (
        *("mnist", 0, None),
    )
    assert config.seed == 0


@pytest.mark.parametrize("model", ["mlp", "linear", "lenet5", "cnn"])
def test_sizes_follow_from_the_dataset(model: str, prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "letters", size=32, classes=26, count=130)
    words = ["dataset=idx", f"dataset.root={folder}", "dataset.val_size=0", f"model={model}"]
    job = prepare(words, real=True)
    dataset = dataset_of(job)
    assert dataset.shape == (1, 32, 32)
    assert len(dataset.classes) == 26
    train_two_batches(job)


def test_group_beats_recipe_and_value_beats_group(prepare: Prepare) -> None:
    job = prepare(["optimizer.lr=0.5", "experiments=seed_mlp", "optimizer=adam", "debug=fast"])
    assert job.optimizer is torch.optim.Adam
    assert job.optimizer_arguments["lr"] == 0.5
    assert (job.config.training.epochs, job.config.training.batch_size) == (2, 64)


# any nn.Module by _target_


def test_modules_of_torch_nested_and_lazy(prepare: Prepare) -> None:
    layers = (
        "[{_target_:torch.nn.Flatten},{_target_:torch.nn.LazyLinear,out_features:16},"
        "{_target_:torch.nn.ReLU},{_target_:torch.nn.LazyLinear,out_features:10}]"
    )
    words = ["model._target_=torch.nn.Sequential", *NO_ARGUMENTS, f"+model._args_={layers}"]
    job = prepare(words)
    assert {name: tuple(p.shape) for name, p in stack_of(job).params.items()} == {
        "1.weight": (1, 16, 784),
        "1.bias": (1, 16),
        "3.weight": (1, 10, 16),
        "3.bias": (1, 10),
    }
    train_two_batches(job)


OWN_MODULE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=8):
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, num_classes))

def not_a_class():
    raise AssertionError
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current directory."""
    (tmp_path / "own_nets.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "own_nets"
    sys.modules.pop("own_nets", None)


def test_module_in_a_file_of_ones_own(prepare: Prepare, own_module: str) -> None:
    target = [f"model._target_={own_module}.Net", *NO_ARGUMENTS, "+model.width=12"]
    with pytest.raises(ConfigError, match=r"own_nets\.Net.*trusted_packages=\[PACKAGE\]"):
        prepare(target)
    job = prepare([*target, f"trusted_packages=[{own_module}]"])
    assert stack_of(job).params["1.weight"].shape == (1, 12, 784)
    assert sys.path.count(os.getcwd()) == 1
    train_two_batches(job)


def test_trusted_package_is_not_trusted_blindly(prepare: Prepare, own_module: str) -> None:
    words = [f"trusted_packages=[{own_module}]", *NO_ARGUMENTS]
    with pytest.raises(ConfigError, match="must be a class that extends Module"):
        prepare([*words, f"model._target_={own_module}.not_a_class"])
    with pytest.raises(ConfigError, match=r"it cannot be imported.*Nett"):
        prepare([*words, f"model._target_={own_module}.Nett"])


def test_choice_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my conf" / "model").mkdir(parents=True)
    file = tmp_path / "my conf" / "model" / "wide.yaml"
    file.write_text("_target_: mnist_exp.training.models.MLP\nhidden: [256]\n")
    composed = compose(["model=wide"], config_dir=str(tmp_path / "my conf"))
    assert composed.model.hidden == [256]
    assert compose(["experiments=seed_mlp"], config_dir=str(tmp_path)).seed == 0
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        compose([], config_dir=str(tmp_path / "nowhere"))


# identity


@pytest.fixture(scope="module")
def base() -> DictConfig:
    return task_config(compose(["optimizer=momentum", "schedule=cosine"]))


def identity(base: DictConfig, key: str, value: Any) -> str:
    """Of `base` with one more value."""
    changed = base.copy()
    OmegaConf.update(changed, key, value, force_add=True)
    assert changed != base
    return schema.identity(changed)


@pytest.mark.parametrize(
    "key, value",
    [
        *[("tracking.uri", "sqlite:///x.db"), ("tracking.experiment", "other")],
        *[("tracking.run_name", "a"), ("tracking.tags", {"a": "b"}), ("tracking.image_every", 3)],
    ],
)
def test_identity_ignores(key: str, value: Any, base: DictConfig) -> None:
    assert identity(base, key, value) == schema.identity(base)


@pytest.mark.parametrize(
    "key, value",
    [
        *[("seed", 1), ("dataset.name", "kmnist"), ("dataset.val_size", 0), ("training.epochs", 9)],
        *[("optimizer.lr", 0.021), ("optimizer._target_", "torch.optim.Adam")],
        *[("model.hidden", [64, 33]), ("schedule.final", 0.5), ("optimizer.nesterov", False)],
    ],
)
def test_identity_depends_on(key: str, value: Any, base: DictConfig) -> None:
    assert identity(base, key, value) != schema.identity(base)


def test_identity_is_that_of_the_record(tmp_path: Path) -> None:
    config = task_config(compose(["debug=overfit", "optimizer=adamw"]))
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(loaded, DictConfig)
    validate(loaded)
    assert schema.identity(loaded) == schema.identity(config)


def test_relative_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = task_config(compose(["dataset=idx", "dataset.root=here"]))
    validate(config)
    assert config.dataset.root == str(tmp_path / "here")


# bad input


@dataclass
class Bad:
    words: Sequence[str]
    message: Sequence[str]  # all of these are in it
    good: Sequence[str]  # the nearest thing that is fine
    real: bool = False  # needs the real data set


def bad(words: str, *message: str, good: str, real: bool = False) -> Any:
    """`words` and `good`: overrides, with blanks between them."""
    return pytest.param(Bad(words.split(), message, good.split(), real), id=words)


def model(target: str, *more: str) -> str:
    return " ".join([f"model._target_={target}", *NO_ARGUMENTS, *more])


def optimizer(target: str, *more: str) -> str:
    return " ".join(
        [f"optimizer._target_={target}", "~optimizer.momentum", "~optimizer.weight_decay", *more]
    )


GOOD_LAYERS = "{_target_:torch.nn.Flatten},{_target_:torch.nn.Linear,in_features:784,out_features:"
UNKNOWN = [
    bad("optimizr.lr=0.2", "optimizr", "Did you mean optimizer", good="optimizer.lr=0.2"),
    bad("optimizer.lrr=0.2", "optimizer.lrr", "Did you mean optimizer.lr?", "+optimizer.lrr=VALUE",
        good="optimizer.lr=0.2"),
    bad("model.hiden=[8]", "model.hiden", "Did you mean model.hidden?", good="model.hidden=[8]"),
    bad("training.epoch=3", "training.epoch:", "Did you mean training.epochs?", "batch_size",
        good="training.epochs=3"),
    bad("+training.epoch=3", "training.epoch:", "Did you mean training.epochs?",
        good="++training.epochs=3"),
    bad("++dataset.val=3", "dataset.val:", "Did you mean dataset.val_size?",
        good="++dataset.val_size=3"),
    bad("training={epoch:3}", "training.epoch:", "Did you mean training.epochs?",
        good="training={epochs:3}"),
    bad("tracking.tags.team=a", "tracking.tags.team", "+tracking.tags.team=VALUE",
        good="+tracking.tags.team=a"),
    bad("sed=1", "sed:", "Did you mean seed?", good="seed=1"),
    bad("+nonsense=1", "nonsense", "schedule, seed, sweep, tracking, training", good="seed=1"),
    bad("modle=cnn", "modle", "Did you mean model?", good="model=cnn"),
    bad("model=cn", "model=cn:", "Did you mean cnn?", "cnn, lenet5, linear, mlp", good="model=cnn"),
    bad("optimizer=sgdd", "sgdd", "Did you mean sgd?", "adagrad, adam, adamw, momentum, nesterov",
        good="optimizer=sgd"),
    bad("experiments=seed", "experiments=seed", "seed_mlp", good="experiments=seed_mlp"),
    bad("debug=quick", "debug=quick", "fast, overfit", good="debug=fast"),
    bad("dataset=mnsit", "dataset=mnsit", "Did you mean mnist?", "idx", good="dataset=mnist"),
    bad("dataset.name=mnsit", "dataset.name=mnsit", "Did you mean mnist?",
        good="dataset.name=mnist", real=True),
    bad("~training.rate", "training.rate", good="~debug"),
]  # fmt: skip
WORDS = [
    bad("optimizer.lr=0.1,0.2", "optimizer.lr=0.1,0.2", "add -m", good="model.hidden=[8,9]"),
    bad("seed", "seed", "KEY=VALUE", good="seed=1"),
    bad("optimizer.lr=[0.1", "optimizer.lr=[0.1", good="model.hidden=[8]"),
    bad("model=3", "model=3", "choices", good="model=mlp"),
    bad("model=null", "model=null", "choices", good="model=cnn"),
    bad("~seed", "seed", good="seed=1"),
    bad("seed=???", "seed has no value yet", "seed=VALUE", good="seed=1"),
    bad("seed=${nonsense}", "seed", "nonsense", good="seed=${training.epochs}"),
    bad("hydra.run.dir=${oc.env:NOT_SET_AT_ALL}", "hydra.run.dir", "NOT_SET_AT_ALL",
        good="dataset.name=${oc.env:NOT_SET_AT_ALL,mnist}"),
]  # fmt: skip
TYPES = [
    bad("training.epochs=many", "training.epochs", "'many'", "a whole number",
        good="training.epochs=3"),
    bad("training.epochs=1.5", "training.epochs", "1.5", "a whole number",
        good="training.epochs=2"),
    bad("training.epochs=null", "training.epochs", good="training.threads=null"),
    bad("training.label_smoothing=some", "training.label_smoothing", "'some'", "a number",
        good="training.label_smoothing=0"),
    bad("seed=[1]", "seed", good="seed=1"),
    bad("tracking.tags=[a]", "tracking.tags", good="+tracking.tags.a=b"),
    bad("trusted_packages=torch", "trusted_packages", good="trusted_packages=[torch]"),
    bad("optimizer.lr=high", "optimizer.lr=high", "a number", good="optimizer.lr=1"),
    bad("optimizer.lr=true", "optimizer.lr=True", "a number", good="optimizer.lr=1"),
    bad("optimizer.lr=null", "optimizer.lr=None", "a number", good="optimizer.lr=0"),
    bad("optimizer=adam optimizer.betas=3", "optimizer", "Adam",
        good="optimizer=adam optimizer.betas=[0.9,0.99]"),
    bad("model.hidden=wide", "model", "MLP", good="model.hidden=[8]"),
]  # fmt: skip
RANGES = [
    bad("optimizer.lr=-1", "optimizer.lr=-1", "0 or more", good="optimizer.lr=0"),
    bad("optimizer.lr=nan", "optimizer.lr=nan", "finite", good="optimizer.lr=1e-9"),
    bad("optimizer.lr=inf", "optimizer.lr=inf", "finite", good="optimizer.lr=1e9"),
    bad("optimizer.momentum=-1", "optimizer", "momentum", "-1", good="optimizer.momentum=0"),
    bad("+optimizer.nesterov=true", "optimizer", "momentum",
        good="+optimizer.nesterov=true optimizer.momentum=0.9"),
    bad("optimizer=adam optimizer.betas=[1.0,0.9]", "optimizer", "beta", "1.0",
        good="optimizer=adam optimizer.betas=[0.0,0.9]"),
    bad("training.batch_size=0", "training.batch_size=0", "1 or more",
        good="training.batch_size=1"),
    bad("training.epochs=-1", "training.epochs=-1", "1 or more", good="training.epochs=1"),
    bad("training.epochs=0", "training.epochs=0", "1 or more", good="training.epochs=1"),
    bad("training.label_smoothing=1", "training.label_smoothing=1", "below 1",
        good="training.label_smoothing=0.99"),
    bad("training.label_smoothing=nan", "training.label_smoothing=nan", "below 1",
        good="training.label_smoothing=0"),
    bad("training.threads=0", "training.threads=0", "from 1", good="training.threads=1"),
    bad("training.compile=maybe", "training.compile=maybe", "auto, always or never",
        good="training.compile=always"),
    bad("seed=-1", "seed=-1", "0 or more", good="seed=0"),
    bad(f"seed={2**63}", "seed=9223372036854775808", "2**63", good=f"seed={2**63 - 1}"),
    bad("dataset.split_seed=-1", "dataset.split_seed=-1", good="dataset.split_seed=0"),
    bad("dataset.root=''", "dataset.root=: must be a folder", good="dataset.root=a"),
    bad("dataset.val_size=-1", "dataset.val_size=-1", "0 or more", good="dataset.val_size=0"),
    bad("dataset.val_size=60000", "dataset.val_size=60000", "0 to 59999",
        good="dataset.val_size=59999", real=True),
    bad("dataset.train_size=0", "dataset.train_size=0", "1 or more", good="dataset.train_size=1"),
    bad("dataset.train_size=55001", "dataset.train_size=55001", "1 to 55000",
        good="dataset.train_size=55000 dataset.val_size=5000", real=True),
    bad("tracking.experiment=''", "tracking.experiment", "a name", good="tracking.experiment=a"),
    bad("tracking.image_every=0", "tracking.image_every=0", "1 or more",
        good="tracking.image_every=1"),
    bad("schedule.warmup_epochs=10.5", "schedule.warmup_epochs=10.5", "training.epochs (10)",
        good="schedule.warmup_epochs=10 training.epochs=10"),
    bad("schedule.warmup_epochs=-1", "schedule", "warmup_epochs", "-1",
        good="schedule.warmup_epochs=0.5"),
    bad("schedule=cosine schedule.final=nan", "schedule.final=nan", "finite",
        good="schedule=cosine schedule.final=0.1"),
    bad("schedule=step schedule.every_epochs=0", "schedule", "every_epochs",
        good="schedule=step schedule.every_epochs=1"),
    bad("training.device=gpu", "training.device=gpu", "auto, cpu, cuda",
        good="training.device=cpu"),
    bad("training.device=cuda:99", "training.device=cuda:99", "This machine has: cpu",
        good="training.device=auto"),
]  # fmt: skip
TARGETS = [
    bad("+model.width=3", "model.width", "MLP takes no such argument", "hidden, dropout",
        good="model.hidden=[3]"),
    bad("~model.hidden +model.hiden=[3]", "model.hiden", "Did you mean hidden?",
        good="~model.hidden +model.hidden=[3]"),
    bad("+optimizer.alpha=1", "optimizer.alpha", "SGD takes no such argument", "nesterov",
        good="+optimizer.maximize=true"),
    bad("+optimizer.params=1", "optimizer", good="+optimizer.maximize=true"),
    bad("+optimizer._args_=[1]", "optimizer._args_", "by its name", good="optimizer.lr=1"),
    bad("+schedule.final=0", "schedule.final", "Constant takes no such argument", "warmup_epochs",
        good="schedule=cosine schedule.final=0"),
    bad(model("torch.nn.Linear"), "model.in_features", "Add +model.in_features=VALUE",
        good=model("mnist_exp.training.models.MLP")),
    bad(model("os.system"), "model._target_=os.system", "not allowed", "torch.nn",
        good=model("mnist_exp.training.models.LeNet5")),
    bad("model._target_=builtins.eval", "builtins.eval", "not allowed",
        good="model._target_=mnist_exp.training.models.MLP"),
    bad("~model._target_", "model._target_", "not allowed", good="~model.hidden"),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:os.system}}]",
        "model._args_.0._target_=os.system", "not allowed",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad("+model.act={_target_:os.system}", "model.act._target_=os.system", "not allowed",
        good="model.dropout=0.1"),
    bad("+model.act={deep:[{_target_:os.system}]}", "model.act.deep.0._target_=os.system",
        "not allowed", good="model.dropout=0.1"),
    bad(model("torch.nn.functional.torch.hub.load"), "torch.nn.functional.torch.hub.load",
        "leads to torch.hub.load", "not allowed",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.training.models.nn.modules.module.functools.partial"), "functools.partial",
        "not allowed", good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.runs.provenance.subprocess.run"), "leads to subprocess.run", "not allowed",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.nn.modules.module.os"), "it cannot be imported", "'os'",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("mnist_exp.training.models.LeNet"), "models.LeNet", "it cannot be imported",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.nn.functional.relu"), "model._target_", "a class that extends Module",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(model("torch.optim.SGD"), "model._target_", "a class that extends Module",
        good=model("mnist_exp.training.models.LeNet5")),
    bad("optimizer._target_=torch.nn.Linear", "optimizer._target_", "extends Optimizer",
        good="optimizer._target_=torch.optim.SGD"),
    bad("optimizer._target_=torch.optim.lr_scheduler.StepLR", "extends Optimizer",
        good="optimizer._target_=torch.optim.SGD"),
    bad("schedule._target_=mnist_exp.training.schedules.Schedule", "schedule._target_",
        "extends Schedule", good="schedule._target_=mnist_exp.training.schedules.Cosine"),
    bad("schedule._target_=torch.optim.SGD", "schedule._target_", "extends Schedule",
        good="schedule._target_=mnist_exp.training.schedules.Cosine"),
    bad(optimizer("torch.optim.LBFGS"), "LBFGS", "cannot be used", "several times a step",
        good=optimizer("torch.optim.Adadelta")),
    bad(optimizer("torch.optim.SparseAdam"), "SparseAdam", "cannot be used", "sparse",
        good=optimizer("torch.optim.NAdam")),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}11}}]", "Sequential",
        "[2, 11]", "[2, 10]",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad(model("torch.nn.Identity"), "Identity", "[2, 1, 28, 28]", "[2, 10]",
        good=model("mnist_exp.training.models.LeNet5")),
    bad(f"{model('torch.nn.Sequential')} +model._args_=[{{_target_:torch.nn.Linear,"
        "in_features:3,out_features:10}]", "Sequential", "shapes cannot be multiplied",
        good=f"{model('torch.nn.Sequential')} +model._args_=[{GOOD_LAYERS}10}}]"),
    bad("model.hidden=[-3]", "MLP", "-3", good="model.hidden=[3]"),
]  # fmt: skip


BAD = [*UNKNOWN, *WORDS, *TYPES, *RANGES, *TARGETS]


PACKAGE = "# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (PACKAGE + "training: {epochz: 2}", ["training.epochz", "training.epochs?"]),
        (PACKAGE + "training: {epochs: many}", ["training.epochs", "'many'", "whole number"]),
        (PACKAGE + "defaults: [override /model: mlpp]", ["model=mlpp", "Did you mean mlp?"]),
        (PACKAGE + "defaults: [override /modell: mlp]", ["modell", "Did you mean model?"]),
        (PACKAGE + "defaults: [model: cnn]", ["override /model: cnn"]),
        (PACKAGE + "- 1", ["the file", "list"]),
        (PACKAGE + "training: {epochs: 2\nseed: 1\n", [", line 3", "YAML"]),
        ("training: {epochs: 2}", ["# @package _global_"]),
        ("", ["# @package _global_"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_bad_recipe_is_named(content: str | bytes, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "my recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        compose([f"experiments={file}"])
    text = str(caught.value)
    assert [part for part in (str(file), *parts) if part not in text] == [], text
    assert len(text.splitlines()) == 1 and re.search("-[0-9a-f]{8}", text) is None


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: Bad, prepare: Prepare) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(case.words, case.real)
    assert [part for part in case.message if part not in str(caught.value)] == [], caught.value


def together() -> list[Any]:
    """What is fine beside the bad input, as much of it in one config as does not collide."""
    batches: list[tuple[list[str], set[str], bool]] = []
    for words, real in dict.fromkeys((tuple(p.values[0].good), p.values[0].real) for p in BAD):
        keys = {word.lstrip("+~").split("=")[0] for word in words}
        parts = {key.split(".")[0] for key in keys}
        keys |= parts & {"model", "optimizer", "schedule"}
        if parts & {"debug", "experiments"}:
            keys.add("everything")
        for others, taken, also_real in batches:
            if not keys & taken and "everything" not in keys | taken and real == also_real:
                others.extend(words)
                taken |= keys
                break
        else:
            batches.append(([*words], keys, real))
    return [pytest.param(words, real, id=" ".join(words)) for words, _, real in batches]


@pytest.mark.parametrize("words, real", together())
def test_what_is_beside_it_is_fine(words: list[str], real: bool, prepare: Prepare) -> None:
    assert stack_of(prepare(words, real)).size == 1


@pytest.mark.parametrize("part", ["schedule", "optimizer"])
def test_nothing_that_is_nested_is_built(part: str, prepare: Prepare, tmp_path: Path) -> None:
    built = tmp_path / "built"
    nested = f"{{_target_:pathlib.Path.touch,self:{{_target_:pathlib.Path,_args_:['{built}']}}}}"
    key = {"schedule": "schedule=cosine schedule.final", "optimizer": "optimizer.momentum"}[part]
    for value in (nested, f"[{nested}]", f"[[{nested}]]"):
        with pytest.raises(ConfigError, match=part):
            prepare(f"{key}={value}".split())
    assert not built.exists()


def test_folder_of_data(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "my images")
    words = ["dataset=idx", "dataset.val_size=0"]

    def message(root: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            prepare([*words, f"dataset.root={root}"], real=True)
        return str(caught.value)

    with pytest.raises(ConfigError, match=r"dataset\.root"):
        prepare(words, real=True)
    nowhere = tmp_path / "nowhere"
    assert message(nowhere).startswith(f"dataset.root={nowhere}: there is no such folder")
    assert "is not a folder" in message(folder / "train-images-idx3-ubyte")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read (Too many levels" in message(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    assert "a file is missing: train-images" in message(tmp_path / "empty")
    job = prepare([*words, f"dataset.root={folder}"], real=True)
    assert dataset_of(job).source == str(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_folder_that_may_not_be_read(prepare: Prepare, tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "locked")
    file = folder / "train-labels-idx1-ubyte"
    file.chmod(0)
    with pytest.raises(ConfigError, match=f"{file}: cannot be read"):
        prepare(["dataset=idx", "dataset.val_size=0", f"dataset.root={folder}"], real=True)


def test_a_recipe_leaves_another_model_alone() -> None:
    """What the seed recipe says must not reach a model or an optimizer that replaces its own."""
    linear = validate(task_config(compose(["experiments=seed_mlp", "model=linear"])))
    assert linear.model["hidden"] == []
    adam = validate(task_config(compose(["experiments=seed_mlp", "optimizer=adam"])))
    assert adam.optimizer["lr"] == 1e-3
