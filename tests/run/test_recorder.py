"""What MLflow holds of a run, and what Python gets back."""

import hashlib
import json
import os
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import numpy as np
import pytest
import torch
from mlflow.entities import Run
from omegaconf import DictConfig, OmegaConf

import mnist_exp
from mnist_exp.config import schema
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity, task_config
from mnist_exp.config.validate import validate
from mnist_exp.data import dataset as data
from mnist_exp.errors import RunFailed
from mnist_exp.figures.curves import learning_curves
from mnist_exp.run.recorder import Result
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking import ui_view as view
from mnist_exp.tracking.limits import RESERVED_TAGS
from tests.helpers import ROOT

EPOCH_METRICS = {
    *("train/loss", "train/accuracy", "val/loss", "val/accuracy"),
    *("lr", "epoch_seconds", "images_per_second"),
}
OVERRIDES = [
    *("debug=fast", "optimizer=momentum", "schedule=cosine", "model.hidden=[16]", "seed=3"),
    *("tracking.experiment=a record", "+tracking.tags.team=blue", "training.compile=never"),
    "training.device=cpu",
]


@pytest.fixture(scope="module")
def overrides(folder: Path, store: str) -> list[str]:
    return [*OVERRIDES, f"tracking.uri={store}", f"hydra.run.dir='{folder}/run'"]


@pytest.fixture(scope="module")
def result(overrides: list[str]) -> Result:
    return mnist_exp.train(overrides)


@pytest.fixture(scope="module")
def client(store: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(store)


@pytest.fixture
def record(result: Result, client: mlflow.MlflowClient) -> Run:
    return client.get_run(result.run_id)


@pytest.fixture
def fetch(result: Result, client: mlflow.MlflowClient, tmp_path: Path) -> Any:
    return lambda name: Path(client.download_artifacts(result.run_id, name, str(tmp_path)))


def test_status_and_name(record: Run, client: mlflow.MlflowClient) -> None:
    assert record.info.status == "FINISHED"
    assert record.info.end_time >= record.info.start_time
    assert record.info.run_name == "mlp-16 momentum cosine lr=0.02 bs=64 seed=3"
    experiment = client.get_experiment(record.info.experiment_id)
    assert experiment.name == "a record"
    shown = json.loads(json.loads(experiment.tags[view.TAG])["state"])["selectedColumns"]
    known = {f"{kind}.`{key}`" for kind in ("metrics", "params", "tags")
             for key in getattr(record.data, kind)}  # fmt: skip
    assert set(shown) <= known  # a column that no run has would be left out
    description = record.data.tags["mlflow.note.content"]
    lines = [line.removesuffix(" \\").strip() for line in description.splitlines()]
    assert all(len(line) <= 80 or len(shlex.split(line)) == 1 for line in lines)
    joined = description.replace(" \\\n ", "")
    assert f"mnist-exp train {record.data.tags['overrides']}" in joined


def test_no_tag_of_its_own_can_be_given(record: Run) -> None:
    own = {key for key in record.data.tags if not key.startswith(("mlflow.", "version."))}
    assert own - {"team"} <= RESERVED_TAGS and "threads" in own


def test_params_are_the_dotted_leaves(record: Run, fetch: Any) -> None:
    leaves = dict(schema.leaves(OmegaConf.load(fetch("config.yaml"))))
    assert record.data.params == {key: str(value) for key, value in leaves.items()}
    assert record.data.params["optimizer.lr"] == "0.02"
    assert record.data.params["model.hidden"] == "[16]"
    assert record.data.params["training.batch_size"] == "64"


def test_one_point_an_epoch(record: Run, result: Result, client: mlflow.MlflowClient) -> None:
    at_the_end = {"test/loss", "test/accuracy", "best/val_accuracy", "best/epoch"}
    assert set(record.data.metrics) == EPOCH_METRICS | at_the_end
    for key in EPOCH_METRICS:
        points = client.get_metric_history(result.run_id, key)
        assert [p.step for p in points] == [1, 2]
        assert [p.value for p in points] == [epoch[key] for epoch in result.history]
    for key in at_the_end:
        points = client.get_metric_history(result.run_id, key)
        assert [(p.step, p.value) for p in points] == [(2, result.test[key])]
    best = max(result.history, key=lambda epoch: epoch["val/accuracy"])
    assert result.test["best/val_accuracy"] == best["val/accuracy"]
    assert result.test["best/epoch"] == best["epoch"]


def test_images_with_steps(result: Result, client: mlflow.MlflowClient, fetch: Any) -> None:
    files = [f.path for f in client.list_artifacts(result.run_id, "images")]
    pictures = [path for path in files if path.endswith(".png")]
    # MLflow's own names: KEY with ~ for /, +step+STEP+timestamp+...
    places = [Path(path).name.split("+")[:3] for path in pictures]
    assert Counter((name, int(step)) for name, _, step in places) == Counter(
        [
            *[("train~first_30", 0), *(("val~predictions", epoch) for epoch in range(3))],
            *[("test~mistakes", 2), ("test~confusion", 2), ("model~first_layer", 2)],
        ]
    )
    for path in pictures:
        pixels = matplotlib.image.imread(fetch(path))
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.05  # not an empty page


def test_config_recomposes(record: Run, fetch: Any, overrides: list[str]) -> None:
    loaded = OmegaConf.load(fetch("config.yaml"))
    assert isinstance(loaded, DictConfig)
    validate(loaded)
    typed = shlex.split(record.data.tags["overrides"])
    assert sorted(typed) == sorted(o for o in overrides if not o.startswith("hydra."))
    again = task_config(compose(typed))
    assert dict(schema.leaves(again)) == dict(schema.leaves(loaded))
    assert record.data.tags["config_hash"] == identity(loaded)


def test_curves(fetch: Any) -> None:
    assert matplotlib.image.imread(fetch("curves.png")).std() > 0.05


def test_checkpoint(result: Result, fetch: Any) -> None:
    folder = fetch("checkpoint")
    digest = hashlib.sha256((folder / "checkpoint.pt").read_bytes()).hexdigest()
    assert (folder / "checkpoint.pt.sha256").read_text().split() == [digest, "checkpoint.pt"]
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state["epochs"] == 2
    own = {k.removeprefix("model."): v for k, v in result.model.state_dict().items()}
    assert state["model"].keys() == own.keys()
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in own.items())


def git(*words: str) -> str:
    answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def test_tags(record: Run, result: Result) -> None:
    tags = record.data.tags
    assert tags["team"] == "blue"
    assert tags["device"] == "cpu"
    assert tags["threads"] == str(torch.get_num_threads())
    assert tags["version.torch"] == torch.__version__
    assert tags["version.mnist_exp"] == mnist_exp.__version__
    assert tags["version.python"].startswith("3.")
    assert tags["command_line"]
    assert tags["output_dir"] == str(result.output_dir.resolve())
    assert (tags["dataset"], tags["model"], tags["optimizer"]) == ("mnist", "mlp", "momentum")
    assert len(tags["config_hash"]) == 64
    assert "reason" not in tags


@pytest.mark.skipif(not git("rev-parse", "HEAD"), reason="not a git checkout")
def test_commit(record: Run, client: mlflow.MlflowClient, fetch: Any) -> None:
    assert record.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert record.data.tags["git_dirty"] in ("true", "false")
    kept = {f.path for f in client.list_artifacts(record.info.run_id)}
    if "uncommitted.diff" in kept:
        assert record.data.tags["git_dirty"] == "true"
        assert fetch("uncommitted.diff").read_text().startswith("diff --git")
    else:
        assert {"config.yaml", "curves.png", "checkpoint", "images"} <= kept


def test_dataset_is_an_input(record: Run) -> None:
    (entry,) = record.inputs.dataset_inputs
    assert entry.dataset.name == "mnist"
    profile = json.loads(entry.dataset.profile)
    assert profile == {"image": [1, 28, 28], "train": 320, "val": 1000, "test": 10000}
    tags = {tag.key: tag.value for tag in entry.tags}
    assert tags["mlflow.data.context"] == "training"
    assert tags["sha256"].startswith(entry.dataset.digest) and len(tags["sha256"]) == 64


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load(
        *("mnist",), root=None, val_size=0, train_size=1, split_seed=0, cache=Path("none")
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, test: data.Split) -> float:
    """With nothing of ours between: float images from 0 to 1 in, logits out."""
    batches = zip(test.images.split(1000), test.labels.split(1000), strict=True)
    right = [(model(x.float() / 255).argmax(1) == y).sum() for x, y in batches]
    return int(sum(right)) / len(test)


def test_model_scores_what_was_recorded(result: Result, store: str, mnist: data.Dataset) -> None:
    mlflow.set_tracking_uri(store)
    try:
        uri = f"runs:/{result.run_id}/model"
        loaded = mlflow.pytorch.load_model(uri)
        info = mlflow.models.get_model_info(uri)
        example = np.asarray(mlflow.pyfunc.load_model(uri).input_example, dtype=np.float32)
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    assert accuracy(loaded, mnist.test) == result.test_accuracy
    (image,), (logits,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (image.type, image.shape) == (np.dtype("float32"), (-1, 1, 28, 28))
    assert (logits.type, logits.shape) == (np.dtype("float32"), (-1, 10))
    assert example.shape == (2, 1, 28, 28)
    assert 0.99 < example.max() <= 1 and example.min() == 0


def test_result(result: Result, record: Run, store: str, folder: Path, mnist: Any) -> None:
    assert result.run_id == record.info.run_id
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    assert set(result.history[0]) == EPOCH_METRICS | {"epoch"}
    assert result.test_accuracy == result.test["test/accuracy"] > 0.15
    assert result.store == store
    assert result.output_dir == folder / "run"
    kept = {"checkpoint.pt", "checkpoint.pt.sha256", "config.yaml", "curves.png", "train.log"}
    states = {f"state-{steps:09d}.pt{end}" for steps in (5, 10) for end in ("", ".sha256")}
    own = {"journal.jsonl", "images", "model", "uncommitted.diff"} | states
    found = {path.name for path in result.output_dir.iterdir() if path.name[0] != "."}
    assert kept <= found <= kept | own
    assert not result.model.training
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert accuracy(result.model, mnist.test) == result.test_accuracy


def test_the_curves_of_a_run_that_diverged_show_its_best_epoch(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int | None] = []

    def drawing(history: Any, best_epoch: int | None, *arguments: Any) -> Any:
        drawn.append(best_epoch)
        return learning_curves(history, best_epoch, *arguments)

    monkeypatch.setattr("mnist_exp.run.recorder.learning_curves", drawing)
    rising = ["schedule=step", "schedule.every_epochs=1", "schedule.gamma=1e30"]
    words = ["debug=fast", "training.compile=never", "training.device=cpu", *rising]
    with pytest.raises(RunFailed, match=r"diverged.*epoch 2"):
        mnist_exp.train([*words, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run"])
    assert drawn == [1]
