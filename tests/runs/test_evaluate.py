"""Saved models on the official test set: exact numbers, their figures, and ensembles."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.config.compose import compose
from mnist_exp.data import dataset as data
from mnist_exp.data.dataset import Dataset
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.runs.evaluate import Evaluation
from mnist_exp.runs.job import prepare
from mnist_exp.runs.recorder import Result
from mnist_exp.runs.train import train
from mnist_exp.sweeps.ensemble import Ensemble
from mnist_exp.sweeps.sweep import SweepResult
from tests.helpers import Interrupting, config_on_record, write_idx

SMALL = [
    *("debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"),
    "tracking.image_every=100",
]


# of a run


@pytest.fixture(scope="module")
def run(store: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("a run")
    return mnist_exp.train([*SMALL, f"tracking.uri={store}", f"hydra.run.dir={folder}/run"])


@pytest.fixture(scope="module")
def found(run: Result, store: str) -> Evaluation:
    return mnist_exp.evaluate(run.run_id, [f"tracking.uri={store}"])


@pytest.fixture(scope="module")
def seeds(store: str, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("a sweep")
    words = ["optimizer.lr=0.001,0.1", "seed=0,1,2", f"hydra.sweep.dir={folder}/jobs"]
    return mnist_exp.train_sweep([*SMALL, f"tracking.uri={store}", *words])


@pytest.fixture(scope="module")
def together(seeds: SweepResult, store: str) -> Ensemble:
    return mnist_exp.ensemble(seeds.run_id, [f"tracking.uri={store}"])


def test_numbers_are_those_of_the_run(run: Result, found: Evaluation) -> None:
    recorded = {key: run.test[key] for key in ("test/loss", "test/accuracy")}
    assert found.test == recorded == found.recorded
    low, high = found.interval
    assert low < found.test["test/accuracy"] < high


def test_numbers_agree_with_each_other(found: Evaluation) -> None:
    accuracy, images = found.test["test/accuracy"], len(found.dataset.test)
    assert sum(one.images for one in found.classes) == images
    hits = sum(one.recall * one.images for one in found.classes)
    assert hits / images == pytest.approx(accuracy)
    own = found.calibration
    assert own.counts.sum() == images
    assert np.nansum(own.accuracy * own.counts) / images == pytest.approx(accuracy)
    assert 0 < own.error < 1


def test_data_that_has_moved_or_changed(store: str, tmp_path: Path) -> None:
    before = write_idx(tmp_path / "before", size=14, classes=2)
    words = [*SMALL, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run", "dataset=idx"]
    own = [f"dataset.root={before}", "dataset.train_size=null", "dataset.val_size=30"]
    done = mnist_exp.train([*words, *own])
    after = before.rename(tmp_path / "after")
    there = [f"tracking.uri={store}"]
    with pytest.raises(ConfigError, match="before: there is no such folder"):
        mnist_exp.evaluate(done.run_id, there)
    found = mnist_exp.evaluate(done.run_id, [*there, f"dataset.root={after}"])
    assert found.test == found.recorded
    again = mnist_exp.reproduce(done.run_id, [*there, f"dataset.root={after}"])
    assert again.verdict == "identical"
    image = tmp_path / "a.png"
    Image.new("L", (14, 14), 200).save(image)
    (taken,) = mnist_exp.predict([image], done.run_id, there, raw=True)  # which needs no data
    assert {name for name, _ in taken.classes} == {"0", "1"}
    labels = after / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-2] + bytes([1, 0]))
    with pytest.raises(ConfigError, match="this is not the data of run"):
        mnist_exp.evaluate(done.run_id, [*there, f"dataset.root={after}"])


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


def test_a_model_that_gives_no_numbers(store: str, tmp_path: Path) -> None:
    there = [f"tracking.uri={store}"]
    image = tmp_path / "a.png"
    Image.new("L", (28, 28), 200).save(image)
    with pytest.raises(RunFailed, match="diverged"):
        mnist_exp.train([*SMALL, *there, f"hydra.run.dir={tmp_path}/run", "optimizer.lr=1e30"])
    said = r"outputs are infinite or no numbers \(nan\); the run is FAILED: diverged: "
    with pytest.raises(ConfigError, match=said):
        mnist_exp.evaluate("last", there)
    with pytest.raises(ConfigError, match=said):
        mnist_exp.predict([image], "last", there, raw=True)


def test_a_damaged_checkpoint(store: str, tmp_path: Path) -> None:
    there = [f"tracking.uri={store}"]
    done = mnist_exp.train([*SMALL, *there, f"hydra.run.dir={tmp_path}/run"])
    client = mlflow.MlflowClient(store)
    folder = Path(client.download_artifacts(done.run_id, "checkpoint", str(tmp_path)))
    weights = bytearray((folder / "checkpoint.pt").read_bytes())
    weights[500] ^= 1
    (folder / "checkpoint.pt").write_bytes(weights)
    client.log_artifact(done.run_id, str(folder / "checkpoint.pt"), "checkpoint")
    with pytest.raises(ConfigError, match=rf"^run {done.run_id}, checkpoint/.*: damaged, its SHA"):
        mnist_exp.evaluate(done.run_id, there)


def test_a_run_that_was_interrupted_before_it_had_a_model(store: str, tmp_path: Path) -> None:
    there = [f"tracking.uri={store}"]
    job = prepare(compose([*SMALL, *there, f"hydra.run.dir={tmp_path}/run"]))
    with pytest.raises(KeyboardInterrupt):
        train(job, job.folder, Interrupting(1))
    with pytest.raises(
        ConfigError, match=r"no artifact checkpoint; the run is KILLED.*mnist-exp res"
    ):
        mnist_exp.evaluate("last", there)


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


def test_figures(found: Evaluation) -> None:
    figures = found.draw()
    assert set(figures) == {"mistakes", "confusion", "calibration", "curves", "first_layer"}

    def written(name: str) -> str:
        return " ".join(text.get_text() for text in figures[name].findobj(Text))

    assert f"expected calibration error {found.calibration.error:.2%}" in written("calibration")
    assert f"{found.test['test/accuracy']:.2%} right" in written("confusion")
    wrong = round(len(found.dataset.test) * (1 - found.test["test/accuracy"]))
    assert f"most confident of {wrong} mistakes" in written("mistakes")
    assert f"best epoch {found.best_epoch}" in written("curves")
    assert "64 units" in written("first_layer")


# of several


def test_probabilities_are_averaged(together: Ensemble) -> None:
    shares = torch.stack([m.logits.double().softmax(-1) for m in together.members]).mean(0)
    assert torch.allclose(together.whole.logits.softmax(-1), shares)
    labels = together.whole.dataset.test.labels
    assert together.whole.test["test/accuracy"] == (shares.argmax(-1) == labels).double().mean()
    loss = -shares[torch.arange(len(labels)), labels].log().mean()
    assert together.whole.test["test/loss"] == pytest.approx(float(loss))


def test_members_are_the_chosen_cell(together: Ensemble, seeds: SweepResult) -> None:
    chosen = seeds.report.chosen
    assert chosen is not None and chosen.label == "lr=0.1"
    assert together.whole.name == "ensemble of 3, lr=0.1"
    assert [m.run_id for m in together.members] == [job.run_id for job in chosen.finished]
    assert [m.test for m in together.members] == [
        pytest.approx(m.recorded, rel=1e-6) for m in together.members
    ]


def test_what_an_ensemble_adds(together: Ensemble) -> None:
    own = [m.test["test/accuracy"] for m in together.members]
    assert together.spread("test/accuracy").n == 3
    assert together.gain("test/accuracy") == pytest.approx(
        together.whole.test["test/accuracy"] - sum(own) / 3
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
    assert f"adds           {gain:+.2f} percentage points of accuracy" in out
    assert "recorded" not in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *("mistakes.png", "confusion.png", "calibration.png")
    }
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert f"mnist-exp evaluate {seeds.run_id[:8]} --ensemble" in capsys.readouterr().err


def test_an_ensemble_of_one_is_none(store: str, tmp_path: Path) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={tmp_path}/jobs"]
    swept = mnist_exp.train_sweep([*words, "optimizer.lr=0.05,0.1"])
    with pytest.raises(ConfigError, match=r"one finished run.*seed=0,1,2"):
        mnist_exp.ensemble(swept.run_id, [f"tracking.uri={store}"])


def test_the_module_is_evaluated_as_it_is_served(run: Result, found: Evaluation) -> None:
    images = found.dataset.test.images.float() / 255
    with torch.no_grad():
        assert torch.allclose(run.model(images), found.logits, atol=1e-4)


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
