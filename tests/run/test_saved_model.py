"""The saved model of a run, and what is wrong with it or with its data."""

import sys
from pathlib import Path

import mlflow
import pytest
from PIL import Image

import mnist_exp
from mnist_exp.config.compose import compose
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.run.evaluate import evaluate
from mnist_exp.run.job import prepare
from mnist_exp.run.train import train
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.uploader import Uploader
from tests.helpers import Interrupting, write_idx

SMALL = [
    *("debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"),
    "tracking.image_every=100",
]


OWN_MODULE = """
import torch
from torch import nn

WIDTH = 8

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(WIDTH), nn.Linear(WIDTH, num_classes))
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.scale
"""


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
    assert found.scores == found.recorded
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
    with pytest.raises(KeyboardInterrupt), Uploader() as uploader:
        train(job, job.folder, Interrupting(1), uploader)
    with pytest.raises(
        ConfigError, match=r"no artifact checkpoint.*; the run is KILLED.*mnist-exp res"
    ):
        mnist_exp.evaluate("last", there)


def test_evaluation_of_a_module_of_ones_own(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_net.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    words = ["trusted_packages=[own_net]", "model._target_=own_net.Net"]
    done = mnist_exp.train([*place, *words, "~model.hidden", "~model.dropout"])
    assert "scale" not in checkpoint.load(tmp_path / "run" / "checkpoint.pt")["model"]
    store = Store(done.store)
    found = evaluate(store, store.find(done.run_id))
    assert found.scores == {key: found.recorded[key] for key in ("test/loss", "test/accuracy")}
    monkeypatch.setattr(sys.modules["own_net"], "WIDTH", 9)
    with pytest.raises(ConfigError, match=r"does not fit own_net\.Net"):
        evaluate(store, store.find(done.run_id))
