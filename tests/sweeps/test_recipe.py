"""A recipe composes to the config that it was made of."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mnist_exp.config.compose import compose
from mnist_exp.config.schema import task_config
from mnist_exp.sweeps.recipe import GROUPS, recipe

Choices = dict[str, str | None]


def composed(overrides: list[str], folder: Path | None = None) -> tuple[DictConfig, Choices]:
    """The resolved config, and the groups' choices."""
    config = compose(overrides, config_dir=None if folder is None else str(folder))
    plain = OmegaConf.to_container(task_config(config), resolve=True)
    return DictConfig(plain), dict(config.hydra.runtime.choices)


def plain(config: DictConfig) -> dict[Any, Any]:
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    del values["tracking"]
    return values


def recomposed(text: str, folder: Path) -> dict[Any, Any]:
    (folder / "experiments").mkdir()
    (folder / "experiments" / "best.yaml").write_text(text, encoding="utf-8")
    return plain(composed(["experiments=best"], folder)[0])


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types: 1 is not 1.0."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


LAYERS = (
    "[{_target_: torch.nn.Flatten},{_target_: torch.nn.LazyLinear, out_features: 10, bias: true}]"
)
SEQUENTIAL = [
    *("~model.hidden", "~model.dropout", "model._target_=torch.nn.Sequential"),
    f"+model._args_={LAYERS}",
]


@pytest.mark.parametrize(
    ("overrides", "empty"),
    [
        ([], []),
        (["model=cnn", "optimizer=adamw", "schedule=cosine", "dataset=kmnist", "seed=7"], []),
        (["optimizer.lr=1e-05", "optimizer.momentum=1.0", "schedule.warmup_epochs=2"], []),
        (["model=linear", "trusted_packages=[mine,yours]", "dataset.classes=['1','null']"], []),
        (["model.hidden=[]", "dataset.val_size=null", "dataset.root='/data/größe: 1 #2'"], []),
        (["+optimizer.text='1e6'", "+optimizer.on='yes'", "+optimizer.a='0o17'"], []),
        (["+optimizer.rest={}", "+optimizer.big=1e+30", "+optimizer.none=null"], []),
        (["debug=overfit", "training.batch_size=32"], []),
        (["~optimizer.weight_decay", "~model.dropout"], ["optimizer", "model"]),
        (SEQUENTIAL, ["model"]),
        (["optimizer=adam", "~schedule.warmup_epochs"], ["schedule"]),
    ],
)
def test_it_composes_to_the_same(overrides: list[str], empty: list[str], tmp_path: Path) -> None:
    """A group is empty where its option would bring back a key that was deleted."""
    config, choices = composed(overrides)
    text = recipe(config, choices, "the best of a sweep")
    found = recomposed(text, tmp_path)
    assert same(found, plain(config)), (found, config)
    defaults = {
        key: value for item in OmegaConf.create(text).defaults for key, value in item.items()
    }
    expected = {group: None if group in empty else choices[group] for group in GROUPS}
    assert defaults == {f"override /{group}": option for group, option in expected.items()}


def test_options_that_are_not_there_leave_their_groups_empty(tmp_path: Path) -> None:
    config, _ = composed(["model=cnn"])
    text = recipe(config, {"dataset": "mnist", "model": "of_elsewhere"}, "")
    assert text.count(": null\n") >= len(GROUPS)
    assert same(recomposed(text, tmp_path), plain(config))


def test_its_text() -> None:
    config, choices = composed(["optimizer.lr=1e-05"])
    lines = recipe(config, choices, "The best of 4.\nAnd \x1bmore: {").splitlines()
    assert lines[:4] == [
        "# @package _global_",
        "# The best of 4. And  more: {",
        "defaults:",
        "- override /dataset: mnist",
    ]
    assert "  lr: 1.0e-05" in lines and "tracking:" not in lines
