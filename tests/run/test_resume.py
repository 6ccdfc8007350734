"""A run that was stopped, and resumed, equals the one that was not, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from mnist_exp.run.trial import STEPS
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.upload import UploadState
from mnist_exp.training import loop
from tests.faults.interruptions import (
    ALL_PARTS,
    GRID,
    NOBODY,
    Fault,
    Forked,
    differences,
    interrupted_run,
    interrupted_sweep,
    raise_in_step,
    reference,
    reference_sweep,
    resume,
    state_of,
    words_of,
)
from tests.helpers import fresh_store, write_idx


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(tmp_path_factory.mktemp("whole"))


def test_kills_at_random_moments(whole: Path, tmp_path: Path) -> None:
    def killed(number: int) -> list[str]:
        place = tmp_path / str(number)
        place.mkdir()
        fault = Fault("SIGKILL", random.Random(number))
        folder = interrupted_run(place, fault)
        assert fault.status == -signal.SIGKILL
        resume(folder)
        return differences(folder, whole)

    assert [killed(number) for number in range(20)] == [[]] * 20


def test_kills_of_a_run_with_augmentation_averages_and_hard_images(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("whole", "early", "late")]
    for place in places:
        place.mkdir()
    whole = reference(places[0], *ALL_PARTS)
    # before the hard images are chosen, and after
    for place, epochs in zip(places[1:], (2, 20), strict=True):
        fault = Fault("SIGKILL", random.Random(epochs), epochs=epochs)
        folder = interrupted_run(place, fault, *ALL_PARTS)
        resume(folder)
        assert differences(folder, whole) == []


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", ["exception", "file operation"])
def test_fault_within_a_step_or_a_write(
    name: str, number: int, whole: Path, tmp_path: Path
) -> None:
    fault = Fault(name, random.Random(number))
    folder = interrupted_run(tmp_path, fault)
    story = RunHistory.of(folder)
    if name == "exception":
        assert (story.status, story.reason) == ("FAILED", "RuntimeError: an injected fault")
    else:
        assert fault.status == -signal.SIGKILL and not story.status
    resume(folder)
    assert differences(folder, whole) == []


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_at_a_random_moment(name: str, status: int, whole: Path, tmp_path: Path) -> None:
    fault = Fault(name, random.Random(7))
    folder = interrupted_run(tmp_path, fault)
    assert fault.status == status and fault.seconds < 5
    story = RunHistory.of(folder)
    assert (story.status, story.reason) == ("KILLED", "interrupted")
    state, problems = checkpoint.newest(folder, lambda found: "")
    assert state is not None and problems == []
    resume(folder)
    assert differences(folder, whole) == []


def test_kill_within_a_checkpoint_or_a_line(whole: Path, tmp_path: Path) -> None:
    """Half a line, half a checkpoint, and a damaged newest one: the one before is used."""
    fault = Fault("SIGKILL", random.Random(3), epochs=20)
    folder = interrupted_run(tmp_path, fault)
    newest = max(folder.glob("state-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with (folder / journal.NAME).open("ab") as file:
        file.write(b'{"time": 17954202')
    (folder / "state-000000099.pt.part").write_bytes(b"half")
    out = resume(folder)
    assert f"{newest}: " in out and "damaged" in out
    assert differences(folder, whole) == []


def test_without_a_checkpoint_it_begins_again(whole: Path, tmp_path: Path) -> None:
    folder = interrupted_run(tmp_path, Fault("SIGKILL", random.Random(5), epochs=2))
    for path in folder.glob("state-*"):
        path.unlink()
    resume(folder)
    assert differences(folder, whole) == []


def test_a_focused_run_goes_on_within_an_epoch(tmp_path: Path) -> None:
    """10 steps, 5, and 6 of 192 images in each later epoch."""
    words = ["training.epochs=6", "training.focus.after=1.5", "training.focus.hardest=0.5"]
    words += ["training.batch_size=32", "training.checkpoint_every=2steps"]

    def trained(name: str, prepare: Callable[[], None]) -> tuple[Path, int]:
        place = tmp_path / name
        place.mkdir()
        process = Forked(["train", *words_of(place, *words)], place, prepare)
        return place / "the run", process.wait()

    def newest(folder: Path) -> int:
        return max(int(path.stem.split("-")[1]) for path in folder.glob("state-*.pt"))

    def failing_in(step: int) -> Callable[[], None]:
        def prepare() -> None:
            loop.STEPS_PER_SYNC = 1  # so that checkpoints are due within the few steps of an epoch
            raise_in_step(STEPS + step)

        return prepare

    whole, status = trained("whole", lambda: None)
    assert (status, newest(whole)) == (0, 39)
    for step in (14, 30):  # of the part of an epoch, and of the second focused one
        folder, status = trained(str(step), failing_in(step))
        assert status != 0 and step - 3 <= newest(folder) < step
        resume(folder)
        assert differences(folder, whole) == [] and newest(folder) == 39


def test_a_killed_run_is_found_by_the_next_command(tmp_path: Path) -> None:
    folder = interrupted_run(tmp_path, Fault("SIGKILL", random.Random(11), epochs=1))
    assert RunHistory.of(folder).status == ""
    show = Forked(["show", "-o", f"{tmp_path}/x.png"], tmp_path)
    assert show.wait() == 0
    err = show.text.read_text()
    assert "KILLED" in err and f"resume '{folder}'" in err
    story = RunHistory.of(folder)
    assert story.status == "KILLED" and "ended without a word" in story.reason


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    process = Forked(["train", *words_of(tmp_path, "training.epochs=100000")], tmp_path)
    folder = tmp_path / "the run"
    try:
        process.until(lambda: len(RunHistory.of(folder).metrics) > 0)
        looks = [Forked(["show", "-o", f"{tmp_path}/{i}.png"], tmp_path) for i in range(2)]
        assert [look.wait() for look in looks] == [0, 0]
        assert RunHistory.of(folder).status == ""
        again = Forked(["resume", str(folder)], tmp_path)
        assert again.wait() == 2 and f"process {process.pid}" in again.text.read_text()
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143


def test_nothing_to_resume(whole: Path) -> None:
    assert "finished" in resume(whole)
    process = Forked(["resume", "nonsense", "tracking.uri=sqlite:///none.db"], whole.parent)
    assert process.wait() == 2 and "nonsense" in process.text.read_text()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_resumed_in_mlflow(elsewhere: bool, tmp_path: Path) -> None:
    """The same MLflow run, each point once; `elsewhere`: though another store is meant by now."""
    store, other = fresh_store(tmp_path), fresh_store(tmp_path / "other")
    own = f"tracking.uri={store}"
    words = [w for w in words_of(tmp_path, "training.epochs=400") if NOBODY not in w]

    def use(uri: str) -> None:
        if elsewhere:
            os.environ["MLFLOW_TRACKING_URI"] = uri

    process = Forked(["train", *words, own], tmp_path, lambda: use(store))
    process.until(lambda: UploadState.of(tmp_path / "the run").offset > 20_000)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_id = UploadState.of(tmp_path / "the run").run_id
    again = Forked(["resume", "last", own], tmp_path, lambda: use(other))
    assert again.wait() == 0, again.text.read_text()
    assert mlflow.MlflowClient(other).search_experiments(filter_string="name = 'mnist-exp'") == []
    assert f"run {run_id[:8]}" in again.text.read_text()
    assert Forked(["sync"], tmp_path).wait() == 0
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.tags["reason"] == ""
    for key in ("train/loss", "val/loss", "lr"):
        steps = [m.step for m in client.get_metric_history(run_id, key)]
        assert steps == list(range(1, 401)), key


def test_a_run_is_not_overwritten(whole: Path) -> None:
    process = Forked(["train", *words_of(whole.parent)], whole.parent)
    assert process.wait() == 2 and "mnist-exp resume" in process.text.read_text()


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_sweep_goes_on_where_it_stopped(how: str, whole_sweep: Path, tmp_path: Path) -> None:
    fault = Fault(how, random.Random(0), epochs=20)
    folder = interrupted_sweep(tmp_path, fault)
    jobs = [folder / str(n) for n in range(4)]
    if how == "SIGINT":
        assert fault.status == 130
        said = (tmp_path / "said.txt").read_text()
        assert said.splitlines()[-1].endswith(f"resume {folder}")
    assert {RunHistory.of(job).status for job in jobs} <= {"KILLED", "FINISHED", ""}
    said = resume(folder)
    assert "of 4 jobs finished" in said
    for n, job in enumerate(jobs):
        assert differences(job, whole_sweep / str(n)) == [], n
    story = RunHistory.of(folder)
    assert story.status == "FINISHED"
    assert story.newest()["jobs/finished"] == 4 and story.newest()["jobs/not_finished"] == 0
    before = [(job / journal.NAME).read_bytes() for job in jobs]
    said = resume(folder)  # the test set is not read again
    assert "0 to run" in said and "nothing to go on with" in said
    assert [(job / journal.NAME).read_bytes() for job in jobs] == before
    alone = Forked(["resume", str(jobs[0])], tmp_path)
    assert alone.wait() == 2 and "a job of a sweep" in alone.text.read_text()


def test_killed_before_its_report(whole_sweep: Path, tmp_path: Path) -> None:
    """Nothing is trained again, and the test set, which was read already, not read again."""
    folder = tmp_path / "cut"
    shutil.copytree(whole_sweep, folder)
    for name in ("sweep.json", "frozen.json"):
        file = folder / name
        file.write_text(file.read_text().replace(str(whole_sweep), str(folder)))
    (entry, *_), _ = journal.read(whole_sweep)
    (folder / journal.NAME).unlink()
    with closing(journal.Journal(folder)) as again:
        again.write("begin", **entry.fields)
    (folder / "best.yaml").unlink()
    before = [(folder / str(n) / journal.NAME).read_bytes() for n in range(4)]
    assert "0 to run" in resume(folder)
    assert RunHistory.of(folder).status == "FINISHED" and (folder / "best.yaml").exists()
    assert [(folder / str(n) / journal.NAME).read_bytes() for n in range(4)] == before
    assert "test/accuracy" in RunHistory.of(folder).metrics


def interrupted_after_a_failure(epochs: int, folder: Path) -> tuple[Path, Path]:
    """A stack of two jobs, of which one has diverged when it is interrupted: the good, the bad."""
    words = [*GRID[:-2], "optimizer.lr=0.01,1e30", "optimizer=sgd", f"training.epochs={epochs}"]
    process = Forked(["train", "-m", *words, f"hydra.sweep.dir={folder}/cut"], folder)
    good, bad = (folder / "cut" / str(n) for n in range(2))
    process.until(lambda: len(RunHistory.of(good).history("train/loss")) > 20)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert (RunHistory.of(good).status, RunHistory.of(bad).status) == ("KILLED", "FAILED")
    return good, bad


def test_what_failed_is_run_again_where_it_is_asked_for(tmp_path: Path) -> None:
    good, bad = interrupted_after_a_failure(400, tmp_path)
    again = Forked(["resume", str(tmp_path / "cut"), "--failed"], tmp_path)
    assert again.wait() == 1
    said = again.text.read_text()
    assert "2 to run" in said and "is not over" not in said
    assert (RunHistory.of(good).status, RunHistory.of(bad).status) == ("FINISHED", "FAILED")
    assert began(good) == began(bad) == ["begin", "resume"]
    steps = [e.fields["step"] for e in journal.read(good)[0] if "train/loss" in str(e.fields)]
    assert sorted(set(steps)) == steps == list(range(1, 401))


def began(folder: Path) -> list[str]:
    return [e.kind for e in journal.read(folder)[0] if e.kind in ("begin", "resume")]


def forget_the_end(folder: Path) -> None:
    """Leave a finished run's journal as if the run had been killed at its end."""
    lines = (folder / journal.NAME).read_text().splitlines(keepends=True)
    (folder / journal.NAME).write_text("".join(lines[:-1]))


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        (".hydra/config.yaml", lambda text: text.replace("epochs: 40", "epochs: 50"), "another"),
        (".hydra/config.yaml", lambda text: "", "config.yaml"),
        (".hydra/hydra.yaml", lambda text: "a: [", "config cannot be read"),
        (journal.NAME, lambda text: "x" + text, "first line is damaged"),
    ],
)
def test_a_folder_that_was_changed(
    file: str, change: Callable[[str], str], part: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "the run"
    shutil.copytree(whole, folder)
    forget_the_end(folder)
    (folder / file).write_text(change((folder / file).read_text()))
    process = Forked(["resume", str(folder)], tmp_path)
    assert process.wait() == 2
    said = process.text.read_text()
    assert str(folder) in said and part in said and "Traceback" not in said, said


def test_data_that_was_changed(tmp_path: Path) -> None:
    data = write_idx(tmp_path / "data", size=8, classes=3)
    words = words_of(tmp_path, "dataset=idx", f"dataset.root={data}", "dataset.train_size=null")
    process = Forked(["train", *words, "dataset.val_size=10"], tmp_path)
    assert process.wait() == 0, process.text.read_text()
    folder = tmp_path / "the run"
    forget_the_end(folder)
    shutil.rmtree(data)
    write_idx(data, size=8, classes=4)
    process = Forked(["resume", str(folder)], tmp_path)
    assert process.wait() == 2
    text = process.text.read_text()
    assert f"the run began with other data than is in {data} now" in text, text
    assert began(folder) == ["begin"]


def test_an_older_run_is_found_beside_a_waiting_one(whole: Path, tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    words = [w for w in words_of(tmp_path, "training.epochs=1") if NOBODY not in w]
    words.append("tracking.flush_seconds=60")
    first = Forked(["train", *words, f"tracking.uri={store}"], tmp_path)
    assert first.wait() == 0, first.text.read_text()
    run_id = UploadState.of(tmp_path / "the run").run_id
    later = [w.replace("the run", "later") for w in words_of(tmp_path, "training.epochs=1")]
    assert Forked(["train", *later], tmp_path).wait() == 0
    for word, said in ((run_id[:8], run_id[:8]), ("last", "")):
        again = Forked(["resume", word, f"tracking.uri={store}"], tmp_path)
        assert again.wait() == 0, again.text.read_text()
        assert "it is finished" in again.text.read_text() and said in again.text.read_text()


def test_a_job_that_failed_stays_so_in_a_stack_that_goes_on(tmp_path: Path) -> None:
    good, bad = interrupted_after_a_failure(4000, tmp_path)
    before = (bad / journal.NAME).read_bytes()
    again = Forked(["resume", str(tmp_path / "cut")], tmp_path)
    epochs = len(RunHistory.of(good).history("train/loss"))
    again.until(lambda: len(RunHistory.of(good).history("train/loss")) > epochs + 20)
    again.send_signal(signal.SIGINT)
    assert again.wait() == 130
    assert (bad / journal.NAME).read_bytes() == before
    steps = [step for step, _ in RunHistory.of(good).history("train/loss")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > epochs + 20


def test_full_disk(tmp_path: Path) -> None:
    """It ends at once and loudly; the checkpoint before is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2000k", "none", disk], check=False,
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("mounting needs the superuser")
    try:
        words = [w for w in words_of(tmp_path) if not w.startswith("hydra.run.dir")]
        words += [f"hydra.run.dir={disk}/run", "model.hidden=[64]", "training.epochs=100000"]
        process = Forked(["train", *words], tmp_path)
        assert process.wait() == 1
        err = process.text.read_text()
        assert "No space left" in err and "Traceback" not in err
        state, problems = checkpoint.newest(disk / "run", lambda found: "")
        assert state is not None and problems == []
        story = RunHistory.of(disk / "run")
        assert story.status == "FAILED" and "No space left" in story.reason
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "every, images, steps",
    # an epoch is shorter than what there is between two looks at its steps
    [("32steps", 4000, [392, 400]), ("3steps", 200, [10, 20])],
)
def test_checkpoints_every_so_many_steps(
    every: str, images: int, steps: list[int], tmp_path: Path
) -> None:
    own = [f"training.checkpoint_every={every}", f"dataset.train_size={images}"]
    own += ["training.batch_size=20", "training.epochs=2"]
    process = Forked(["train", *words_of(tmp_path, *own)], tmp_path)
    assert process.wait() == 0, process.text.read_text()
    state = state_of(tmp_path / "the run")
    assert state["core"]["epoch"] == 2  # the last one is always kept
    names = sorted(path.name for path in (tmp_path / "the run").glob("state-*.pt"))
    assert names == [f"state-{step:09}.pt" for step in steps]
