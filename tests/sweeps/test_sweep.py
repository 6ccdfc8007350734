"""A sweep is one object in MLflow and in its folder."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mnist_exp.data import dataset as data
from mnist_exp.figures.style import ORANGE
from mnist_exp.run import recorder
from mnist_exp.tracking import checkpoint
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.limits import RESERVED_TAGS
from mnist_exp.training import loop
from mnist_exp.training.events import Epoch
from tests.helpers import fresh_store, write_idx
from tests.sweeps.helpers import (
    IMAGES,
    ONE_AT_A_TIME,
    SIZES,
    SMALL,
    Done,
    call,
    same_points,
    swept,
    train_all,
)


def test_each_job_has_its_folder(seeds: Done) -> None:
    files = {"checkpoint.pt", "checkpoint.pt.sha256", "config.yaml", "train.log", ".hydra"}
    for number, child in seeds.children.items():
        folder = seeds.own / str(number)
        assert child.data.tags["output_dir"] == str(folder)
        assert {path.name for path in folder.iterdir()} >= files
        config = OmegaConf.load(folder / "config.yaml")
        own = json.loads(child.data.tags["swept"])
        for key, value in own.items():
            assert OmegaConf.select(config, key) == float(value)
        assert OmegaConf.load(folder / ".hydra" / "config.yaml") == config
        typed: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
        assert {f"{key}={value}" for key, value in own.items()} <= set(typed)
        hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
        assert (hydra.job.num, hydra.runtime.output_dir) == (number, str(folder))


def test_no_tag_of_its_own_can_be_given(seeds: Done) -> None:
    tags = {key for run in seeds.runs for key in run.data.tags}
    own = {key for key in tags if not key.startswith(("mlflow.", "version."))}
    assert own <= RESERVED_TAGS and {"chosen", "swept"} <= own


def test_each_job_has_its_log(seeds: Done, tmp_path: Path) -> None:
    for number, child in seeds.children.items():
        text = (seeds.own / str(number) / "train.log").read_text()
        lines = text.splitlines()
        assert lines[0] == f"{child.info.run_name}  on cpu"
        epochs = [line for line in lines if line.startswith("epoch ")]
        curves = seeds.curves(child)
        assert len(epochs) == 2
        for line, (epoch, loss), (_, accuracy) in zip(
            epochs, curves["train/loss"], curves["val/accuracy"], strict=True
        ):
            assert line.startswith(f"epoch {epoch}/2  train loss {loss:.4f}  ")
            assert f"val accuracy {accuracy:7.2%}" in line
        kept = seeds.fetch(child, "train.log", tmp_path)
        assert kept.read_text() == text


def test_checkpoint_scores_what_the_best_epoch_did(seeds: Done) -> None:
    mnist = data.load(
        *("mnist",), root=None, val_size=500, train_size=320, split_seed=0, cache=Path("none")
    )
    assert mnist.val is not None
    for number, child in seeds.children.items():
        weights = checkpoint.load(seeds.own / str(number) / "checkpoint.pt")["model"]
        x = ((mnist.val.images.float() / 255 - mnist.mean) / mnist.std).flatten(1)
        layers = sorted({name.split(".")[0] for name in weights}, key=int)
        for layer in layers:
            x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
            x = x.relu() if layer != layers[-1] else x
        right = int((x.argmax(1) == mnist.val.labels).sum())
        assert abs(right - 500 * child.data.metrics["best/val_accuracy"]) <= IMAGES


def test_parent_and_children(seeds: Done) -> None:
    parent = seeds.parent
    assert (parent.info.status, len(seeds.children)) == ("FINISHED", 8)
    assert {c.data.tags["mlflow.parentRunId"] for c in seeds.children.values()} == {
        parent.info.run_id
    }
    assert {r.info.experiment_id for r in seeds.runs} == {parent.info.experiment_id}
    assert seeds.client.get_experiment(parent.info.experiment_id).name == "mnist-exp"
    assert seeds.client.search_runs(["0"]) == []  # Default
    assert parent.info.start_time <= min(c.info.start_time for c in seeds.children.values())
    assert parent.info.end_time >= max(c.info.end_time for c in seeds.children.values())
    assert parent.data.params == {
        "sweep.optimizer.lr": "0.02,0.1",
        "sweep.optimizer.momentum": "0,0.9",
        "sweep.seed": "0,3",
    }
    assert parent.info.run_id in seeds.out
    assert "8 jobs, 1 stack of 8\n" in seeds.out and seeds.err == ""


def test_runs_have_the_colours_of_their_cells(seeds: Done) -> None:
    """In MLflow's charts, that is, as in the report: the chosen cell is orange."""
    colours: dict[str, set[str]] = {}
    for child in seeds.children.values():
        own = swept(child)
        cell = f"lr={own['lr']} momentum={own['momentum']}"
        colours.setdefault(cell, set()).add(child.data.tags["mlflow.runColor"])
    assert len(colours) == 4 and {len(each) for each in colours.values()} == {1}
    assert colours[seeds.parent.data.tags["chosen"]] == {ORANGE}
    assert len(set().union(*colours.values())) == 4


def test_later_edits_do_not_reach_queued_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    file = tmp_path / "conf" / "optimizer" / "own.yaml"
    file.write_text("_target_: torch.optim.SGD\nlr: 0.25\n")
    fit, edits = loop.fit, iter(["_target_: torch.optim.SGD\nlr: 0.5\n", "lr: [nonsense\n"])

    def edit(*arguments: Any, **more: Any) -> Iterator[Any]:
        file.write_text(next(edits))
        return fit(*arguments, **more)

    monkeypatch.setattr(loop, "fit", edit)
    place = ["--config-dir", str(tmp_path / "conf")]
    words = ["optimizer=own", "training.batch_size=32,64", "training.epochs=1", ONE_AT_A_TIME]
    done = train_all(tmp_path, *place, *SMALL, *words)
    assert done.status == 0, done.err
    assert "2 stacks of 1" in done.out
    assert [c.data.params["optimizer.lr"] for c in done.children.values()] == ["0.25", "0.25"]
    assert next(edits, None) is None  # else nothing was edited


def test_jobs_are_told_apart_by_their_names(seeds: Done) -> None:
    names = [child.info.run_name for child in seeds.children.values()]
    assert len(set(names)) == 8
    assert names[0] == "mlp-16 momentum lr=0.02 bs=64 seed=0 momentum=0"


def test_skip_invalid(tmp_path: Path) -> None:
    words = ["optimizer.lr=0.1,-1,0.2,0.1", "training.epochs=1", "sweep.skip_invalid=true"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert [swept(c)["lr"] for c in done.children.values()] == ["0.1", "0.2"]
    assert {c.info.status for c in done.children.values()} == {"FINISHED"}
    assert done.parent.info.status == "FINISHED"
    lines = [line for line in done.out.splitlines() if "INVALID" in line]
    assert any("-1" in line and "optimizer.lr=-1" in line for line in lines)
    assert any("the same as job 0" in line for line in lines)
    assert len(lines) == 2


def test_diverged_run_ends_alone(seeds: Done, tmp_path: Path) -> None:
    words = [w.replace("lr=0.02,0.1", "lr=0.02,1e30,0.1") for w in seeds.words]
    done = train_all(tmp_path, *words)
    assert done.status == 1
    assert "4 of 12 jobs did not finish" in done.err
    assert "12 jobs, 1 stack of 12" in done.out
    assert done.parent.info.status == "FAILED"
    reason = done.parent.data.tags["reason"]
    assert "4 of 12 jobs did not finish" in reason
    failed = [c for c in done.children.values() if swept(c)["lr"] == "1e+30"]
    assert len(failed) == 4
    for child in failed:
        assert child.info.status == "FAILED"
        assert "diverged" in child.data.tags["reason"] and "1e+30" in child.data.tags["reason"]
        log = Path(child.data.tags["output_dir"], "train.log").read_text()
        assert "diverged" in log
        weights = checkpoint.load(Path(child.data.tags["output_dir"]) / "checkpoint.pt")["model"]
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    table = [line for line in done.out.splitlines() if " FAILED " in line]
    assert len(table) == 4 and all("diverged" in line for line in table)
    for before in seeds.children.values():
        after = done.child(**swept(before))
        assert after.info.status == "FINISHED"
        same_points(seeds.curves(before), done.curves(after), SIZES)
    assert done.parent.data.tags["chosen"] == seeds.parent.data.tags["chosen"]
    assert done.parent.data.metrics["jobs/finished"] == 8
    assert done.parent.data.metrics["jobs/not_finished"] == 4


def test_a_sweep_is_not_overwritten_by_the_next_one(tmp_path: Path) -> None:
    words = [*SMALL, "training.epochs=1", "hydra/launcher=basic"]
    first = train_all(tmp_path, *words, "optimizer.lr=0.1,0.2")
    assert first.status == 0, first.err
    record = (first.own / "journal.jsonl").read_bytes()
    same = f"hydra.sweep.dir='{first.own}'"
    store = f"tracking.uri='{fresh_store(tmp_path / 'again')}'"
    status, _, err = call("train", "-m", *words, same, store, "optimizer.lr=0.3,0.4")
    assert status == 2 and f"mnist-exp resume {first.own}" in err
    assert (first.own / "journal.jsonl").read_bytes() == record


def test_a_sweep_of_augmentations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for all jobs, and the pictures of the run that is chosen."""
    done = train_all(tmp_path, *SMALL, "training.epochs=1", "augmentation=shift,flip", "seed=0,1")
    assert done.status == 0, done.err
    assert caplog.text.count("augmentation.flip=0.5: it mirrors") == 1
    assert "2 stacks of 2" in done.out
    for child in done.children.values():
        files = done.client.list_artifacts(child.info.run_id, "images")
        names = {Path(file.path).name.split("+")[0] for file in files}
        is_tested = "test/accuracy" in child.data.metrics
        assert (names >= {"train~first_30", "train~augmented"}) == is_tested


def test_folder_named_after_what_is_swept(tmp_path: Path) -> None:
    """As Hydra's own documentation has it."""
    subdir = "hydra.sweep.subdir='lr=${optimizer.lr},job=${hydra.job.num}'"
    done = train_all(tmp_path, *SMALL, "training.epochs=1", "optimizer.lr=0.1,0.2", subdir)
    assert done.status == 0, done.err
    folders = {Path(c.data.tags["output_dir"]).name for c in done.children.values()}
    assert folders == {"lr=0.1,job=0", "lr=0.2,job=1"}


@pytest.mark.parametrize("when", ["training", "test"])
def test_interrupted_sweep(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left RUNNING."""
    fit = loop.fit

    def signalled(*arguments: Any, **more: Any) -> Iterator[Any]:
        for event in fit(*arguments, **more):
            yield event
            if isinstance(event, Epoch) and when == "training":
                raise KeyboardInterrupt

    def late(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "fit", signalled)
    if when == "test":
        monkeypatch.setattr(recorder, "record_deferred_test", late)
    done = train_all(tmp_path, *SMALL, "seed=0,1", "training.batch_size=32,64", ONE_AT_A_TIME)
    *_, said, again = done.err.splitlines()
    assert (done.status, said) == (130, "mnist-exp: interrupted. To go on with it:")
    assert shlex.split(again)[-2:] == ["resume", str(done.own)]
    assert done.parent.info.status == "KILLED"
    statuses = [c.info.status for c in done.children.values()]
    assert statuses == (["KILLED"] * 2 if when == "training" else ["FINISHED"] * 4)


def test_sweep_that_all_fails(tmp_path: Path) -> None:
    words = ["optimizer.lr=1e30,2e30", "training.epochs=1"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 1 and "2 of 2 jobs did not finish" in done.err
    assert done.parent.info.status == "FAILED"
    assert "best.yaml" not in done.out  # no command that cannot work
    kept = {f.path for f in done.client.list_artifacts(done.parent.info.run_id)}
    assert kept >= {"leaderboard.md", "leaderboard.csv"} and "best.yaml" not in kept


def test_a_later_sweep_of_the_same_process_reads_its_data_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where the data is made, looked at and made again."""
    cached: Any = data.load  # for the other tests of this folder
    monkeypatch.setattr(data, "load", cached.__wrapped__)
    root = tmp_path / "data"
    trained_on = []
    for classes in (3, 4):
        shutil.rmtree(root, ignore_errors=True)
        write_idx(root, size=8, classes=classes)
        words = [*SMALL, "dataset=idx", f"dataset.root={root}", "dataset.train_size=100"]
        words += ["dataset.val_size=10", "optimizer.lr=0.1,0.2", ONE_AT_A_TIME]
        done = train_all(tmp_path / str(classes), *words)
        assert done.status == 0, done.err
        trained_on.append({RunHistory.of(done.own / str(job)).dataset_digest for job in (0, 1)})
    assert len(trained_on[0]) == len(trained_on[1]) == 1
    assert trained_on[0] != trained_on[1]
