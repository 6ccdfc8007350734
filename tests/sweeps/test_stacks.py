"""What shares a stack, and that stacked equals alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.entities import Run

from mnist_exp.sweeps import stacks
from mnist_exp.sweeps.manifest import SweepJob
from mnist_exp.tracking import checkpoint
from tests.helpers import fresh_store
from tests.sweeps.helpers import (
    CURVES,
    IMAGES,
    SIZES,
    SMALL,
    Done,
    alone,
    planned,
    same_points,
    train_all,
)


@pytest.mark.parametrize("name", ["seeds", "mixed"])
def test_stacked_equals_alone(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done: Done = request.getfixturevalue(name)
    assert done.status == 0, done.err
    count = len(done.children)
    assert f"{count} jobs, 1 stack of {count}\n" in done.out
    uri = fresh_store(tmp_path)
    seen = set()
    # of three keys with two values each, every second job has each pair of values all the same
    for number in (0, 3, 5, 6) if count == 8 else range(count):
        child, own = done.children[number], json.loads(done.children[number].data.tags["swept"])
        plain = [w for w in done.words if w.split("=")[0] not in own]
        result = alone(
            tmp_path / f"run {number}", uri, *plain, *(f"{k}={v}" for k, v in own.items())
        )
        client = mlflow.MlflowClient(uri)
        record = client.get_run(result.run_id)
        assert child.info.status == record.info.status == "FINISHED"
        assert child.info.run_name.startswith(record.info.run_name)
        assert child.data.tags["config_hash"] == record.data.tags["config_hash"]
        params = {k: v for k, v in child.data.params.items() if k != "tracking.uri"}
        assert params == {k: v for k, v in record.data.params.items() if k != "tracking.uri"}
        other = Done(tmp_path, [], 0, "", "", client)
        same_points(done.curves(child), other.curves(record), SIZES)
        assert len(done.curves(child)["train/loss"]) == 2
        seen.add(tuple(done.curves(child)["train/loss"]))
        for key in ("best/val_accuracy", "best/epoch"):
            step, value = points(done, child, key)
            assert step == 2 and value == pytest.approx(record.data.metrics[key], abs=IMAGES / 500)
        a, b = (
            checkpoint.load(folder / "checkpoint.pt")
            for folder in (done.own / str(number), tmp_path / f"run {number}")
        )
        assert a["epochs"] == b["epochs"] and a["model"].keys() == b["model"].keys()
        for key, tensor in a["model"].items():
            torch.testing.assert_close(tensor, b["model"][key], rtol=1e-3, atol=1e-5)
    assert len(seen) == 4  # else nothing was compared


def points(done: Done, found: Run, key: str) -> tuple[int, float]:
    """The only point of a metric."""
    (point,) = done.client.get_metric_history(found.info.run_id, key)
    return point.step, point.value


def sizes(jobs: Sequence[SweepJob], most: int | None = None) -> list[int]:
    found = stacks.plan(jobs, most)
    numbers = [p.number for stack in found for p in stack]
    assert sorted(numbers) == [p.number for p in jobs]  # each once
    return sorted(len(stack) for stack in found)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("optimizer.lr=0.1,0.2 seed=0,1", [4]),
        ("optimizer=adam optimizer.betas=[0.9,0.99],[0.8,0.9]", [2]),
        ("optimizer.weight_decay=0,1e-4 training.label_smoothing=0,0.1", [4]),
        ("+optimizer.dampening=0,0.5 optimizer.momentum=0,0.9", [4]),
        ("schedule=constant,cosine,step schedule.warmup_epochs=0,1", [6]),
        ("training.patience=null,1,2", [3]),
        ("training.ema=null,0.5,1 training.clip_norm=null,1", [6]),
        ("training.decay_norms=true,false seed=0,1", [2, 2]),
        ("model=linear,mlp seed=0,1", [2, 2]),
        ("model.hidden=[8],[16],[8,8] seed=0,1", [2, 2, 2]),
        ("training.batch_size=32,64 seed=0,1", [2, 2]),
        ("training.epochs=1,2 dataset.train_size=100,200", [1, 1, 1, 1]),
        ("dataset.split_seed=0,1 optimizer.lr=0.1,0.2", [2, 2]),
        ("optimizer=sgd,adam,adamw", [1, 1, 1]),
        ("optimizer=momentum +optimizer.nesterov=true,false", [1, 1]),
        ("optimizer=momentum,nesterov optimizer.lr=0.1,0.2", [2, 2]),
    ],
)
def test_what_shares_a_stack(words: str, expected: list[int], images: list[str]) -> None:
    assert sizes(planned(*images, *words.split())) == expected


@pytest.fixture(scope="module")
def eight(images: list[str]) -> list[SweepJob]:
    return planned(*images, "seed=range(4)", "optimizer.lr=0.1,0.2")


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 8, 100])
def test_stacks_are_balanced(most: int, eight: list[SweepJob]) -> None:
    found = sizes(eight, most)
    assert len(found) == -(-8 // most)
    assert max(found) <= most and max(found) - min(found) <= 1


@pytest.mark.parametrize(
    "words, most, expected",
    [
        ("model=cnn", None, [1, 1, 1]),
        ("model=cnn", 2, [1, 2]),
        ("optimizer=adam optimizer._target_=torch.optim.NAdam", None, [1, 1, 1]),
        ("optimizer=adam optimizer._target_=torch.optim.NAdam", 8, [1, 1, 1]),
        ("model.hidden=[2000,2000]", None, [1, 1, 1]),  # beyond the caches
        ("model.hidden=[2000,2000]", 3, [3]),
    ],
)
def test_what_stays_alone_on_a_cpu(
    words: str, most: int | None, expected: list[int], images: list[str]
) -> None:
    assert sizes(planned(*images, *words.split(), "seed=0,1,2"), most) == expected


def test_a_stack_of_one_seed_where_it_can_be(eight: list[SweepJob]) -> None:
    """Its images are gathered once for all."""
    for stack in stacks.plan(eight, 2):
        assert len({p.values["seed"] for p in stack}) == 1


def test_a_stack_fits_into_the_memory_of_a_gpu(
    images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an average of one job, and with augmentation, fewer do."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**26, 2**27))

    def most(*words: str) -> int:
        jobs = planned(*images, "seed=0,1", *words)
        return stacks._stack_limit([replace(j.run, device=torch.device("cuda")) for j in jobs])

    plain = most()
    averaged, augmented = most("training.ema=null,1"), most("augmentation=elastic")
    assert 1 < averaged < plain < stacks.GPU_STACK_MOST
    assert 1 < augmented < plain


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    def train(patience: str) -> Done:
        words = ["optimizer.lr=0.05,0,0.2", "training.epochs=5", f"training.patience={patience}"]
        return train_all(tmp_path_factory.mktemp("patience"), *SMALL, *words)

    return train


def test_stopped_run_leaves_the_stack(patient: Callable[[str], Done]) -> None:
    done, without = patient("2"), patient("null")
    assert (done.status, without.status) == (0, 0), done.err
    assert "3 jobs, 1 stack of 3" in done.out
    for lr in ("0.05", "0.2"):
        same_points(without.curves(without.child(lr=lr)), done.curves(done.child(lr=lr)), SIZES)
        assert "stopped" not in done.child(lr=lr).data.tags
    still = done.child(lr="0")  # which learns nothing
    assert still.info.status == "FINISHED"
    curves, before = done.curves(still), without.curves(without.child(lr="0"))
    assert {key: [s for s, _ in own] for key, own in curves.items()} == {
        key: [1, 2, 3] for key in CURVES
    }
    same_points({key: own[:3] for key, own in before.items()}, curves, SIZES)
    assert "after epoch 3" in still.data.tags["stopped"]
    log = Path(still.data.tags["output_dir"], "train.log").read_text()
    assert "stopped after epoch 3" in log and log.count("\nepoch ") == 3
    assert "3 runs" in done.out and "2 runs" in done.out


def test_swept_patience_shares_a_stack(tmp_path: Path) -> None:
    words = ["optimizer.lr=0", "training.epochs=4", "training.patience=1,2,null"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert "3 jobs, 1 stack of 3" in done.out
    lengths = [len(done.curves(c)["val/loss"]) for c in done.children.values()]
    assert lengths == [2, 3, 4]


def test_stacks_are_trained_here_where_a_fork_cannot_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "THREADS", 2)
    monkeypatch.setattr(stacks, "can_fork", lambda: True)
    monkeypatch.setattr(stacks, "can_train_in_fork", lambda: False)
    done = train_all(tmp_path, *SMALL, "training.batch_size=32,64")
    assert done.status == 0, done.err
    assert "the stacks are trained one after the other: torch.compile" in done.out
    assert "2 at a time" not in done.out
    assert {child.info.status for child in done.children.values()} == {"FINISHED"}
