"""What cannot be composed is named in one message, with the nearest that can; no run is made."""

import re
from pathlib import Path

import pytest

from mnist_exp.config.compose import compose
from mnist_exp.errors import ConfigError
from tests.config.bad_input import Bad, Prepare, bad, beside, is_named

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
    bad("model=cn", "model=cn:", "Did you mean cnn?", "cnn, cnn_pooled, lenet5, linear, mlp",
        good="model=cnn"),
    bad("optimizer=sgdd", "sgdd", "Did you mean sgd?", "adagrad, adam, adamw, momentum, muon",
        good="optimizer=sgd"),
    bad("experiments=seed", "experiments=seed", "seed_mlp", good="experiments=seed_mlp"),
    bad("debug=quick", "debug=quick", "fast, overfit", good="debug=fast"),
    bad("dataset=mnsit", "dataset=mnsit", "Did you mean mnist?", "idx", good="dataset=mnist"),
    bad("dataset.name=mnsit", "dataset.name=mnsit", "Did you mean mnist?",
        good="dataset.name=mnist", real=True),
    bad("~training.rate", "training.rate", "Did you mean", good="~debug"),
]  # fmt: skip
WORDS = [
    bad("optimizer.lr=0.1,0.2", "optimizer.lr=0.1,0.2", "add -m", good="model.hidden=[8,9]"),
    bad("training.ema=null,0.5", "training.ema=null,0.5", "add -m", without="As a list",
        good="training.ema=0.5"),
    bad("training.ema=interval(0,1)", "training.ema=interval(0,1): that is a sweep: add -m",
        good="training.ema=0.5"),
    bad("training.ema=cast(20)", "training.ema=cast(20): Unknown function", "are: bool,choice",
        without="Exception", good="training.ema=0.5"),
    bad("model=${foo}", "model=${foo}: Interpolation key 'foo' not found", good="model=mlp"),
    bad("training.ema=${oc.env:NOT_SET_AT_ALL}", "training.ema: Environment variable",
        without="KeyError", good="training.ema=0.5"),
    bad("training={focus:1}", "training.focus: takes no value itself, and is given 1",
        good="training.focus.after=null"),
    bad("augmentation.foo=1", "augmentation.foo: there is no such key. augmentation has: shift",
        good="augmentation.shift=1"),
    bad("seed", "seed", "KEY=VALUE", good="seed=1"),
    bad("optimizer.lr=[0.1", "optimizer.lr=[0.1", good="model.hidden=[8]"),
    bad("seed=1 model=3", "model=3: a group takes", "model can be: cnn,", good="model=mlp"),
    bad("debug=fast augmentation=null", "augmentation=null: a group takes",
        "augmentation can be: affine, elastic", good="augmentation=none"),
    bad("model=[1,2]", "model=[1,2]: a group takes", "model can be: cnn,", good="model=cnn"),
    bad("+augmentation=elastic", "+augmentation=elastic", "in its place: augmentation=elastic",
        good="augmentation=[elastic,flip] dataset=mnist"),
    bad("~training.ema", "~training.ema: cannot be removed", "training.ema=null",
        good="training.ema=null"),
    bad("~augmentation.shift", "~augmentation.shift: cannot be removed", "augmentation.shift=0.0",
        good="augmentation.shift=0.0"),
    bad("~training.focus", "~training.focus: cannot be removed", "has: after, hardest, random",
        good="training.focus.after=null"),
    bad("~seed", "seed", good="seed=1"),
    bad("seed=???", "seed has no value yet", "seed=VALUE", good="seed=1"),
    bad("seed=${nonsense}", "seed", "nonsense", good="seed=${training.epochs}"),
    bad("hydra.run.dir=${oc.env:NOT_SET_AT_ALL}", "hydra.run.dir", "NOT_SET_AT_ALL",
        good="dataset.name=${oc.env:NOT_SET_AT_ALL,mnist}"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*UNKNOWN, *WORDS])
def test_bad_input_is_named(case: Bad, prepare: Prepare) -> None:
    is_named(case, prepare)


@pytest.mark.parametrize("words, real", beside([*UNKNOWN, *WORDS]))
def test_what_is_beside_it_is_fine(words: list[str], real: bool, prepare: Prepare) -> None:
    prepare(words, real)


PACKAGE = "# @package _global_\n"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (PACKAGE + "training: {epochz: 2}", ["training.epochz", "training.epochs?"]),
        (
            PACKAGE + "training: {epochs: many}",
            ["training.epochs=many", "a whole number, 1 or more"],
        ),
        (PACKAGE + "training:", ["training=null: it holds keys. training has: epochs, batch_size"]),
        (PACKAGE + "defaults: [override /model: mlpp]", ["model=mlpp", "Did you mean mlp?"]),
        (PACKAGE + "defaults: [override /modell: mlp]", ["modell", "Did you mean model?"]),
        (PACKAGE + "defaults: [model: cnn]", ["override /model: cnn"]),
        (PACKAGE + "defaults: [seed_ml]", ["seed_ml: there is no such", "Did you mean seed_mlp?"]),
        (
            PACKAGE + "augmentation: elastic",
            [
                "augmentation: takes no value itself, and is given elastic",
                "override /augmentation:",
            ],
        ),
        (PACKAGE + "augmentation: [elastic]", ["augmentation: takes no value", "affine, elastic"]),
        (
            PACKAGE + "training: {focus: 1}",
            [
                "training.focus: takes no value itself, and is given 1",
                "has: after, hardest, random",
            ],
        ),
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


def test_a_recipes_choice_that_cannot_be_resolved_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(PACKAGE + "defaults: [override /model: '${foo}']")
    with pytest.raises(ConfigError, match=r"^\$\{foo\}: Interpolation key 'foo' not found"):
        compose([f"experiments={file}"])
