"""A run again from its record alone: identical, within tolerance, or different, and why."""

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from omegaconf import OmegaConf

import mnist_exp
from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.data import dataset as data
from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.run import lookup
from mnist_exp.run.console import Reporter
from mnist_exp.run.job import prepare
from mnist_exp.run.recorder import Result
from mnist_exp.run.reproduce import Agreement, Reproduction, Rounding, reproduce
from mnist_exp.run.train import train
from mnist_exp.sweeps.sweep import SweepResult
from mnist_exp.system.processes import process_identity
from mnist_exp.tracking.uploader import Uploader
from mnist_exp.training import loop, metrics
from mnist_exp.training.events import Epoch
from mnist_exp.training.stack import Stack
from tests.helpers import Interrupting, config_on_record, finish, fresh_store, start

SMALL = ["debug=fast", "training.compile=never", "training.device=cpu", "tracking.image_every=100"]


# the comparison

EXACT = Rounding()


def points(*values: float) -> dict[int, float]:
    return dict(enumerate(values, start=1))


def test_equal_is_identical() -> None:
    found = Agreement.of("train/loss", points(2.0, math.nan), points(2.0, math.nan), EXACT)
    assert (found.compared, found.first_different, found.first_beyond) == (2, None, None)


def test_the_greatest_difference_is_named() -> None:
    found = Agreement.of("train/loss", points(2.0, 1.0, 0.5), points(2.0, 1.1, 0.51), EXACT)
    assert (found.first_different, found.first_beyond, found.shown) == (2, None, 2)
    assert (found.recorded, found.again) == (1.0, 1.1)
    assert found.row()[-2:] == ["10 %", "30 %, or 0.01 nats"]


@pytest.mark.parametrize(
    "name, recorded, again, beyond",
    [
        ("first steps", points(2.3, 2.2), points(2.3001, 2.2), None),
        ("first steps", points(2.3, 2.2), points(2.3, 2.21), 2),
        ("train/loss", points(0.5), points(0.52), 1),  # the first epoch is held to more
        ("train/loss", points(0.5, 0.4), points(0.5, 0.5), None),
        ("train/loss", points(0.5, 0.4), points(0.5, 0.6), 2),
        ("train/loss", points(0.5, 1e-4), points(0.5, 9e-3), None),  # of hundredths nobody cares
        ("val/loss", points(0.1), points(0.18), None),
        ("val/loss", points(0.1), points(0.3), 1),
        ("train/loss", points(0.5, 0.4), points(0.5), 2),  # it ended before
        ("train/loss", points(0.5, 0.4), points(0.5, math.nan), 2),
    ],
)
def test_tolerance(
    name: str, recorded: dict[int, float], again: dict[int, float], beyond: int | None
) -> None:
    found = Agreement.of(name, recorded, again, EXACT)
    assert found.first_beyond == beyond
    assert beyond is None or found.shown == beyond


def test_what_was_not_recorded_does_not_count() -> None:
    found = Agreement.of("train/loss", points(0.5), points(0.5, 0.4), EXACT)
    assert (found.compared, found.first_different) == (1, None)


@pytest.mark.parametrize(
    "rounding, seen, other",
    [  # the greatest differences that were seen of one computation, and those of another seed
        (
            Rounding(convolutions=True),
            [8e-7, 2e-4, 7e-3, 9e-3, 0.04, 0.05, 0.1, 0.12],
            [1e-3, 0.03, 0.03, 0.04, 0.02, 0.08, 0.03, 0.1],
        ),
        (
            Rounding(bfloat16=True),
            [2e-5, 2e-4, 5e-4, 4e-4, 6e-4, 1e-3, 4e-3, 3e-3],
            [1e-3, 4e-3, 0.01, 8e-3, 0.02, 2e-3, 0.02, 0.01],
        ),
        (
            Rounding(convolutions=True, bfloat16=True),
            [3e-4, 8e-3, 0.04, 0.05, 0.1, 0.2, 0.2, 0.4],
            [2e-3, 0.03, 0.03, 0.04, 0.02, 0.08, 0.04, 0.1],
        ),
    ],
)
def test_convolutions_and_bfloat16_are_allowed_what_they_round(
    rounding: Rounding, seen: list[float], other: list[float]
) -> None:
    def beyond(differences: list[float]) -> int | None:
        again = points(*(2.0 * (1 + difference) for difference in differences))
        return Agreement.of("first steps", points(*[2.0] * 8), again, rounding).first_beyond

    assert beyond([2.4 * difference for difference in seen]) is None
    assert beyond(other) in (1, 2)
    assert beyond([difference / 1.4 for difference in other]) in (1, 2)


# runs


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(store: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("a run")
    words = [f"tracking.uri={store}", f"hydra.run.dir={folder}/run", "training.threads=1"]
    result = mnist_exp.train([*SMALL, "training.epochs=3", *words])
    shutil.rmtree(folder)  # the record in the store is all there is
    return result


@pytest.fixture
def again(run: Result, store: str) -> Callable[..., Reproduction]:
    def call(**more: object) -> Reproduction:
        opened = lookup.open_store([f"tracking.uri={store}"])
        return reproduce(opened, opened.find(run.run_id), Reporter(), **more)  # type: ignore[arg-type]

    return call


@pytest.fixture
def edited(run: Result, store: str, tmp_path: Path) -> Iterator[Callable[[str, object], None]]:
    """Changes the config that the store holds of the run, and puts it back."""
    with config_on_record(store, run.run_id, tmp_path) as (before, put):

        def edit(key: str, value: object) -> None:
            changed = OmegaConf.create(before.decode())
            OmegaConf.update(changed, key, value)
            put(OmegaConf.to_yaml(changed).encode())

        yield edit


def test_identical(again: Callable[..., Reproduction], run: Result) -> None:
    found = again()
    assert found.verdict == "identical"
    assert found.differences == []
    compared = {each.name: each.compared for each in found.agreements}
    assert compared == {"first steps": 5, "train/loss": 3, "val/loss": 3, "test/loss": 1}


def test_nothing_is_left(
    again: Callable[..., Reproduction],
    store: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))  # torch's own
    opened = mlflow.MlflowClient(store)
    before = len(opened.search_runs(["1"]))
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path / "root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again()
    assert len(opened.search_runs(["1"])) == before
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_has_left_is_removed(
    again: Callable[..., Reproduction],
    run: Result,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing else that is there."""
    elsewhere = {**process_identity(), "host": "elsewhere"}
    others = {
        "mnist-exp-reproduce-a-file": "",
        "mnist-exp-reproduce-b/owner.json": "nonsense",
        "mnist-exp-reproduce-c/owner.json": json.dumps(elsewhere),  # which cannot be told
        "mnist-exp-reproduce-d/run/journal.jsonl": "",
    }
    for name, text in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = ["reproduce", run.run_id, f"tracking.uri={store}"]
    process = start(words, tmp_path, TMPDIR=str(tmp_path))
    try:
        assert process.stdout is not None
        assert " on cpu" in process.stdout.readline()  # it begins
        process.send_signal(signal.SIGSTOP)
        (left,) = [p for p in tmp_path.iterdir() if (p / "config.yaml").exists()]
        again()
        assert left.exists()  # it may go on
    finally:
        process.kill()
        finish(process)
    again()
    assert not left.exists()
    assert all((tmp_path / name).exists() for name in others)


def test_another_thread_count_is_within_tolerance(again: Callable[..., Reproduction]) -> None:
    found = again(threads=2)
    assert found.verdict == "within tolerance"
    assert found.differences == ["threads: 1, now 2"]


def test_another_seed_is_different_without_first_losses(
    again: Callable[..., Reproduction],
    edited: Callable[[str, object], None],
    run: Result,
    store: str,
) -> None:
    """The record of a run from before they were kept: losses alone could not tell."""
    client = mlflow.MlflowClient(store)
    losses = client.get_run(run.run_id).data.tags["first_losses"]
    client.delete_tag(run.run_id, "first_losses")
    try:
        found = again(threads=2)
        assert found.verdict == "within tolerance"
        assert any("first losses are not on record" in said for said in found.differences)
        edited("training.label_smoothing", 1e-6)
        assert again().verdict == "different"
    finally:
        client.set_tag(run.run_id, "first_losses", losses)


def test_a_second_run_that_fails_says_why(
    again: Callable[..., Reproduction], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fit = loop.fit

    def failing(*arguments: object, **more: object) -> Iterator[object]:
        for event in fit(*arguments, **more):  # type: ignore[arg-type]
            yield event
            if isinstance(event, Epoch):
                raise RuntimeError("out of luck")

    monkeypatch.setattr(loop, "fit", failing)
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    for keep in (None, fresh_store(tmp_path / "kept")):
        found = again(keep=keep)
        assert found.verdict == "different"
        assert found.differences[0] == "the second run failed: RuntimeError: out of luck"
        assert [each.first_beyond for each in found.agreements] == [None, 2, 2, 3]
        losses = found.table()[1][1]
        # the second epoch is not there again
        assert losses[5:] == ["-", "- %", "30 %, or 0.01 nats"]


def test_no_more_is_trained_than_was_recorded(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run", "training.epochs=50"]
    job = prepare(compose([*SMALL, *words, "schedule=cosine"]))
    with pytest.raises(KeyboardInterrupt), Uploader() as uploader:
        train(job, job.folder, Interrupting(2), uploader)
    predict, splits = metrics.predict, []

    def counted(stack: Stack, dataset: Dataset, split: Split) -> torch.Tensor:
        splits.append(split)
        return predict(stack, dataset, split)

    monkeypatch.setattr(metrics, "predict", counted)
    found = mnist_exp.reproduce("last", [f"tracking.uri={store}"])
    assert found.verdict == "identical" and found.differences == []
    assert [(each.name, each.compared) for each in found.agreements[1:]] == [
        ("train/loss", 2),
        ("val/loss", 2),
    ]
    assert len(splits) == 2  # validation, after each epoch; and no test set


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"device": "cuda:99"}, "cannot be trained here, --device cuda:99: training.device"),
        ({"threads": 5000}, "cannot be trained here, --threads 5000: training.threads=5000"),
        ({"threads": 0, "device": "cpu"}, "here, --threads 0 and --device cpu: training.threads=0"),
        ({"keep": "nonsense"}, "^--keep nonsense: "),
        ({"keep": "sqlite:////none/a.db"}, r"choose another store: --keep sqlite:////"),
        ({"root": "/nowhere"}, "here, as its record says: dataset.root=/nowhere"),
    ],
)
def test_what_was_typed_is_named(
    asked: dict[str, object], said: str, again: Callable[..., Reproduction]
) -> None:
    with pytest.raises(ConfigError, match=said):
        again(**asked)


def test_another_seed_is_different(
    again: Callable[..., Reproduction], edited: Callable[[str, object], None]
) -> None:
    edited("seed", 1)
    found = again()
    assert found.verdict == "different"
    assert found.differences == [
        "config.yaml: it is not what the run began with (its hash differs from config_hash)"
    ]
    steps = found.agreements[0]
    assert (steps.name, steps.first_different, steps.first_beyond) == ("first steps", 1, 1)


@pytest.mark.parametrize(
    "key, value",
    [("optimizer.lr", 0.08), ("model.hidden", [64, 33]), ("dataset.split_seed", 1)],
)
def test_other_values_are_different(
    key: str,
    value: object,
    again: Callable[..., Reproduction],
    edited: Callable[[str, object], None],
) -> None:
    edited(key, value)
    assert again().verdict == "different"


def test_code_and_versions_are_compared(
    again: Callable[..., Reproduction], run: Result, store: str
) -> None:
    client = mlflow.MlflowClient(store)
    before = client.get_run(run.run_id).data.tags
    changed = {"mlflow.source.git.commit": "0" * 40, "version.torch": "1.0"}
    for tag, value in changed.items():
        client.set_tag(run.run_id, tag, value)
    try:
        said = again().differences
    finally:
        for tag in changed:
            client.set_tag(run.run_id, tag, before[tag])
    assert said[0].startswith("code: commit 00000000, now ")
    assert said[1] == f"torch: 1.0, now {torch.__version__}"


@pytest.mark.parametrize(
    "tag, value",
    [
        *[("first_losses", value) for value in ("[1.0,", "5", '["a"]')],
        ("threads", "two"),
        ("choices", "[1]"),
        ("choices", "nonsense"),
    ],
)
def test_a_damaged_tag_is_named(
    tag: str,
    value: str,
    again: Callable[..., Reproduction],
    run: Result,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = mlflow.MlflowClient(store)
    before = client.get_run(run.run_id).data.tags[tag]
    client.set_tag(run.run_id, tag, value)
    monkeypatch.setattr(loop, "fit", None)  # nothing is trained for it
    try:
        with pytest.raises(ConfigError, match=rf"^run {run.run_id}: its tag {tag} is damaged, "):
            again()
    finally:
        client.set_tag(run.run_id, tag, before)


def test_other_data_is_named(
    again: Callable[..., Reproduction], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = data.load

    def other(name: str, **more: object) -> data.Dataset:
        dataset = load(name, **more)  # type: ignore[arg-type]
        return data.replace(dataset, digest="f" * 64)  # type: ignore[attr-defined]

    monkeypatch.setattr(data, "load", other)
    assert "now ffffffffffff" in " ".join(again().differences)


def test_it_can_be_kept(
    again: Callable[..., Reproduction], run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    kept = fresh_store(tmp_path / "kept")
    found = again(keep=kept)
    assert found.verdict == "identical"
    recorded = mlflow.MlflowClient(kept).get_run(found.kept_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["reproduces"] == run.run_id
    assert recorded.data.metrics["test/loss"] == run.test["test/loss"]


def test_a_run_of_a_stack(store: str, tmp_path: Path) -> None:
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={tmp_path}/jobs"]
    swept: SweepResult = mnist_exp.train_sweep([*words, "optimizer.lr=0.01,0.02", "seed=4"])
    assert swept.report.chosen is not None
    job = swept.report.chosen.finished[0]
    found = mnist_exp.reproduce(job.run_id, [f"tracking.uri={store}"])
    assert found.verdict in ("identical", "within tolerance")
    assert "models in its stack: 2, now 1" in found.differences


def test_a_convolutional_job_of_a_stack(store: str, tmp_path: Path) -> None:
    """Alone, it has another memory layout."""
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={tmp_path}/jobs", "model=cnn"]
    words += ["training.epochs=1", "training.batch_size=32"]
    words += ["model.width=4", "model.layers=[1,1]", "hydra.launcher.max_stack=2"]
    swept: SweepResult = mnist_exp.train_sweep([*words, "optimizer.lr=0.05", "seed=4,5"])
    assert swept.report.chosen is not None
    first, second = (job.run_id for job in swept.report.chosen.finished)
    found = mnist_exp.reproduce(first, [f"tracking.uri={store}"])
    assert "models in its stack: 2, now 1" in found.differences
    assert found.verdict == "within tolerance", found.table()
    client = mlflow.MlflowClient(store)
    before, now = (
        points(*json.loads(client.get_run(i).data.tags["first_losses"])) for i in (first, second)
    )
    other = Agreement.of("first steps", before, now, Rounding(convolutions=True))
    assert other.first_beyond == 1


def test_a_run_that_diverged_does_so_again(store: str, tmp_path: Path) -> None:
    words = [f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run", "training.epochs=3"]
    rising = ["schedule=step", "schedule.every_epochs=1", "schedule.gamma=1e12"]
    with pytest.raises(RunFailed, match=r"diverged.*epoch 2"):
        mnist_exp.train([*SMALL, *words, *rising])
    found = mnist_exp.reproduce("last", [f"tracking.uri={store}"])
    assert found.verdict == "identical"
    assert found.agreements[1].compared == 1


def test_what_cannot_be_compared_is_refused(store: str, tmp_path: Path) -> None:
    words = [f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run"]
    with pytest.raises(RunFailed, match="diverged"):
        mnist_exp.train([*SMALL, *words, "optimizer.lr=1e30"])
    with pytest.raises(ConfigError, match="no epoch of it is recorded; the run is FAILED"):
        mnist_exp.reproduce("last", [f"tracking.uri={store}"])


def test_the_first_losses_are_on_record(run: Result, store: str) -> None:
    tags = mlflow.MlflowClient(store).get_run(run.run_id).data.tags
    losses = json.loads(tags["first_losses"])
    assert len(losses) == 5  # of an epoch of debug=fast, which has no more
    assert losses[0] == pytest.approx(math.log(10), abs=0.1)  # ten classes, all alike at the start


def test_a_run_that_stopped_early_is_compared_to_its_end(store: str, tmp_path: Path) -> None:
    words = [f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/run", "training.epochs=20"]
    mnist_exp.train([*SMALL, *words, "training.patience=1", "optimizer.lr=0"])
    found = mnist_exp.reproduce("last", [f"tracking.uri={store}"])
    assert found.verdict == "identical" and found.differences == []
    assert [(each.name, each.compared) for each in found.agreements[1:]] == [
        ("train/loss", 2),
        ("val/loss", 2),
        ("test/loss", 1),
    ]
