"""The Python API: what can be typed can be called, and it prints nothing unless it is verbose."""

import inspect
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import mnist_exp.cli.main  # registers all commands
from mnist_exp import api
from mnist_exp.cli.command import COMMANDS
from mnist_exp.config import paths
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.sweeps.sweep import SweepResult
from mnist_exp.tracking.run_log import OpenRuns, open_runs_at
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState
from tests.faults.delivery import begin, faults_in, whole
from tests.helpers import fresh_store

SMALL = [
    *("debug=fast", "training.compile=never", "training.threads=1", "training.device=cpu"),
    "hydra/launcher=basic",
]


@pytest.fixture(scope="module")
def sweep(store: str, folder: Path) -> SweepResult:
    words = [*SMALL, f"tracking.uri={store}", f"hydra.sweep.dir={folder}/jobs", "seed=0,1"]
    return mnist_exp.train_sweep(words)


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Holds what a test prints, once what its fixtures have printed is dropped."""
    capfd.readouterr()
    return capfd


def test_every_command_is_a_function() -> None:
    of_the_terminal = {"ui", "completion"}
    assert {*COMMANDS} - of_the_terminal <= {*mnist_exp.__all__}
    for name in mnist_exp.__all__:
        assert inspect.isfunction(getattr(mnist_exp, name)) and getattr(api, name).__doc__


def test_show(silent: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overview = mnist_exp.show(["dataset.val_size=0"])
    assert overview.facts["images"] == "60,000 training, 10,000 test"
    assert overview.dataset.name == "mnist" and isinstance(overview.figure, Figure)
    mnist_exp.save_figure(overview.figure, tmp_path / "new" / "first.png")
    assert (tmp_path / "new" / "first.png").stat().st_size > 1000
    assert silent.readouterr() == ("", "")


def test_report(
    sweep: SweepResult, store: str, silent: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = mnist_exp.report(sweep.run_id, [f"tracking.uri={store}"], output=tmp_path)
    assert report.run_id == sweep.run_id and report.table() == sweep.table()
    assert {*report.files} == {path.name for path in tmp_path.iterdir()} >= {"leaderboard.md"}
    assert silent.readouterr() == ("", "")


def test_resume_of_what_has_ended(
    sweep: SweepResult, store: str, silent: pytest.CaptureFixture[str]
) -> None:
    assert mnist_exp.resume(sweep.run_id, [f"tracking.uri={store}"]) is None
    assert mnist_exp.resume(str(sweep.folder)) is None
    assert silent.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="job of a sweep"):
        mnist_exp.resume(str(sweep.folder / "0"))


@pytest.fixture
def open_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenRuns:
    """The registry of a project in which nothing has been run."""
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    return open_runs_at(tmp_path)


def test_resume_delivers_a_record_that_has_ended(
    store: str, open_runs: OpenRuns, tmp_path: Path
) -> None:
    """Also of a run that it refuses to go on with."""
    whole(tmp_path / "finished", open_runs, store)
    assert mnist_exp.resume(str(tmp_path / "finished")) is None
    assert faults_in(tmp_path / "finished", store) == []
    begin(tmp_path / "failed", open_runs, store).end("FAILED", "diverged in epoch 1")
    with pytest.raises(ConfigError, match="It would again"):
        mnist_exp.resume(str(tmp_path / "failed"))
    assert Store(store).get(UploadState.of(tmp_path / "failed").run_id).status == "FAILED"
    assert open_runs.entries() == []


def test_what_waits_is_delivered_elsewhere_or_given_up(
    open_runs: OpenRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mnist_exp.sync() == (0, {})
    gone, there = f"sqlite:///{tmp_path}/gone/a.db", fresh_store(tmp_path)
    for name in ("a", "b"):
        whole(tmp_path / name, open_runs, gone)
    count, reasons = mnist_exp.sync()
    assert count == 0 and set(reasons) == {tmp_path / "a", tmp_path / "b"}
    assert mnist_exp.sync([tmp_path / "a"], to=there) == (1, {})
    assert faults_in(tmp_path / "a", there) == []
    for arguments in ({"forget": True}, {"forget": True, "to": there, "folders": ["b"]}):
        with pytest.raises(ConfigError, match="forget"):
            mnist_exp.sync(**arguments)
    with pytest.raises(RunFailed, match=r"b: not delivered: .*\n.*sync FOLDER --to URI"):
        COMMANDS["sync"].run([])
    for words in (["--forget"], ["--forget", "b", "--to", there]):
        with pytest.raises(ConfigError, match="--forget"):
            COMMANDS["sync"].run(words)
    assert COMMANDS["sync"].run(["--forget", str(tmp_path / "b")]) == 0
    assert COMMANDS["sync"].run([]) == 0
    assert "1 of the waiting runs given up" in capsys.readouterr().out


def test_page_of_the_ui(sweep: SweepResult, store: str) -> None:
    uri, page = api.ui_page(sweep.run_id, [f"tracking.uri={store}"])
    assert uri == store and sweep.run_id in page


def test_a_text_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    """A text is a list of its letters to Python."""
    store = [f"tracking.uri={fresh_store(tmp_path)}"]
    for call in (
        lambda: mnist_exp.history("last", overrides=store),
        lambda: mnist_exp.runs(filters="lr>0.1", overrides=store),
        lambda: mnist_exp.export(tmp_path / "x.csv", "last", overrides=store),
    ):
        with pytest.raises(ConfigError, match="must be a list"):
            call()
    for tags in (["a=b"], {"a": 3}):
        with pytest.raises(ConfigError, match="tags: must be texts by their names"):
            mnist_exp.tag("last", tags, store)  # type: ignore[arg-type]
