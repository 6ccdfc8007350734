"""The models of a sweep's chosen cell together, on the test set and on validation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.data import dataset as data
from mnist_exp.data.dataset import Dataset
from mnist_exp.errors import ConfigError
from mnist_exp.sweeps.ensemble import Ensemble
from mnist_exp.sweeps.sweep import SweepResult

SMALL = [
    *("debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"),
    "tracking.image_every=100",
]


@pytest.fixture(scope="module")
def seeds(store: str, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("a sweep")
    words = ["optimizer.lr=0.001,0.1", "seed=0,1,2", f"hydra.sweep.dir={folder}/jobs"]
    return mnist_exp.train_sweep([*SMALL, f"tracking.uri={store}", *words])


@pytest.fixture(scope="module")
def together(seeds: SweepResult, store: str) -> Ensemble:
    return mnist_exp.ensemble(seeds.run_id, [f"tracking.uri={store}"])


def test_probabilities_are_averaged(together: Ensemble) -> None:
    shares = torch.stack([m.logits.double().softmax(-1) for m in together.members]).mean(0)
    assert torch.allclose(together.whole.logits.softmax(-1), shares)
    labels = together.whole.dataset.test.labels
    assert together.whole.scores["test/accuracy"] == (shares.argmax(-1) == labels).double().mean()
    loss = -shares[torch.arange(len(labels)), labels].log().mean()
    assert together.whole.scores["test/loss"] == pytest.approx(float(loss))


def test_members_are_the_chosen_cell(together: Ensemble, seeds: SweepResult) -> None:
    chosen = seeds.report.chosen
    assert chosen is not None and chosen.label == "lr=0.1"
    assert together.whole.name == "ensemble of 3, lr=0.1"
    assert [m.run_id for m in together.members] == [job.run_id for job in chosen.finished]
    assert [m.scores for m in together.members] == [
        pytest.approx(m.recorded, rel=1e-6) for m in together.members
    ]


def test_what_an_ensemble_adds(together: Ensemble) -> None:
    own = [m.scores["test/accuracy"] for m in together.members]
    assert together.spread("test/accuracy").n == 3
    assert together.gain("test/accuracy") == pytest.approx(
        together.whole.scores["test/accuracy"] - sum(own) / 3
    )
    assert together.gain("test/loss") < 0  # the logarithm is concave


def test_an_ensemble_as_it_is_printed(
    together: Ensemble,
    seeds: SweepResult,
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["evaluate", seeds.run_id[:8], f"tracking.uri={store}"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--ensemble", "--output", f"{tmp_path}/figures"])
    out = capsys.readouterr().out
    for member in together.members:
        assert re.search(rf"^ *{member.run_id[:8]} .* seed=\d +\d\d\.\d\d%", out, re.MULTILINE)
    assert together.spread("test/accuracy").percent() in out
    gain = 100 * together.gain("test/accuracy")
    assert f"adds           {gain:+.3f} percentage points of accuracy" in out
    assert "recorded" not in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *("mistakes.png", "confusion.png", "calibration.png")
    }
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--ensemble", "--split=val", "--tta", "--output", f"{tmp_path}/val"])
    out = capsys.readouterr().out
    assert re.search(r"^ run +name +val/accuracy +val/loss +calibration error", out, re.MULTILINE)
    assert "of the validation set, TTA over 5 shifts\n" in out
    assert "test/" not in out and "predictions" not in out
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert f"mnist-exp evaluate {seeds.run_id[:8]} --ensemble" in capsys.readouterr().err


def test_an_ensemble_on_validation(seeds: SweepResult, store: str) -> None:
    found = mnist_exp.ensemble(seeds.run_id, [f"tracking.uri={store}"], split="val")
    assert seeds.report.chosen is not None
    best = [job.metric("best/val_accuracy") for job in seeds.report.chosen.finished]
    assert [m.scores["val/accuracy"] for m in found.members] == best
    assert found.whole.examples is found.whole.dataset.val and not found.whole.recorded
    shares = torch.stack([m.logits.double().softmax(-1) for m in found.members]).mean(0)
    assert torch.allclose(found.whole.logits.exp(), shares)


def test_members_with_different_validation_images_have_none_together(
    store: str, tmp_path: Path
) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={tmp_path}/jobs"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# @package _global_\ndataset: {split_seed: '${seed}'}\n")
    swept = mnist_exp.train_sweep([*words, "seed=0,1", f"experiments={recipe}"])
    assert len(mnist_exp.ensemble(swept.run_id, [f"tracking.uri={store}"]).members) == 2
    with pytest.raises(ConfigError, match=r"^--split val: .*different validation images"):
        mnist_exp.ensemble(swept.run_id, [f"tracking.uri={store}"], split="val")


def test_an_ensemble_of_one_is_none(store: str, tmp_path: Path) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={tmp_path}/jobs"]
    swept = mnist_exp.train_sweep([*words, "optimizer.lr=0.05,0.1"])
    with pytest.raises(ConfigError, match=r"one finished run.*seed=0,1,2"):
        mnist_exp.ensemble(swept.run_id, [f"tracking.uri={store}"])


def test_one_data_set_serves_all_members(
    seeds: SweepResult, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = data.load

    def counted(*arguments: Any, **more: Any) -> Dataset:
        loaded.append(arguments)
        return load(*arguments, **more)

    monkeypatch.setattr(data, "load", counted)
    mnist_exp.ensemble(seeds.run_id, [f"tracking.uri={store}"])
    assert len(loaded) == 1
