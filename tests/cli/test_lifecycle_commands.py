"""What is printed and asked by the commands that look at, stop, remove and clear runs."""

import io
import json
from pathlib import Path

import pytest

from mnist_exp.cli.main import main
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.upload import UploadState
from tests.catalog import made_up
from tests.catalog.made_up import open_runs as open_runs
from tests.helpers import fresh_store
from tests.programs import OWNER, WAIT, Start, running_owner


class Terminal(io.StringIO):
    """A terminal in which something is typed."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = fresh_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def typed(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_status(
    open_runs: OpenRuns, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("status") == 0
    assert capsys.readouterr().out.startswith("nothing is being trained")
    made_up.begin(tmp_path / "outputs" / "a run", open_runs, uri, epochs=2)
    assert typed("status") == 0
    assert "epoch 2/10   90.00%" in capsys.readouterr().out
    assert typed("status", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)[0]) == {
        *("id", "name", "kind", "started", "epochs", "epochs_asked", "best_val_accuracy"),
        *("images_per_second", "seconds_left", "folder", "process"),
    }


def test_stop_says_how_to_go_on_in_the_store_of_the_run(
    open_runs: OpenRuns, uri: str, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which need not be the one that is looked into otherwise."""
    other, folder = f"sqlite:///{tmp_path / 'other.db'}", tmp_path / "outputs" / "a run"
    owner = running_owner(start(OWNER + WAIT))
    made_up.begin(folder, open_runs, other, owner=owner)
    UploadState(other, "0123456789").save(folder)
    assert typed("stop", str(folder)) == 0
    printed = capsys.readouterr().out
    assert "resume 01234567" in printed and f"MLFLOW_TRACKING_URI={other}" in printed


@pytest.mark.parametrize("name", ["status", "stop", "rm", "gc"])
def test_the_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(name, "--help") == 0
    assert f"example: mnist-exp {name} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["rm", "last"], ["gc", "--checkpoints"]])
def test_nothing_goes_unless_somebody_agrees(
    words: list[str],
    open_runs: OpenRuns,
    uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "outputs" / "a run"
    made_up.run(folder, open_runs, uri)
    made_up.deliver(open_runs)
    checkpoint = folder / "state-000000010.pt"
    checkpoint.write_text("a checkpoint")
    before = made_up.kept(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # a pipe
    assert typed(*words) == 2
    printed = capsys.readouterr()
    assert "--yes" in printed.err and str(folder) in printed.out
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert typed(*words) == 0
        assert capsys.readouterr().out.endswith("nothing is removed\n")
    assert made_up.kept(tmp_path) == before
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert typed(*words) == 0
    assert not checkpoint.exists() and folder.exists() == (words[0] == "gc")


def test_what_is_not_there_is_told_with_status_2(
    open_runs: OpenRuns, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.run(tmp_path / "outputs" / "a run", open_runs, uri)
    for words in (["stop", "ffffffff"], ["rm", "ffffffff", "--yes"], ["status", "ffffffff"]):
        assert typed(*words) == 2
        assert "ffffffff: " in capsys.readouterr().err
    assert typed("rm", f"tracking.uri={uri}", "--yes") == 2
    assert "none is given" in capsys.readouterr().err
    assert typed("stop", "last") == 2
    assert "it is FINISHED" in capsys.readouterr().err


def test_gc_says_what_is_kept(
    open_runs: OpenRuns, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("gc", "--dry-run") == 0
    assert capsys.readouterr().out == "nothing to clear\n"
    assert typed("gc", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 0
    made_up.run(tmp_path / "outputs" / "a run", open_runs, uri)
    for run in open_runs.entries():
        open_runs.remove(run.key)
    assert typed("gc", "--yes") == 0
    assert "never had the whole record: " in capsys.readouterr().out
    assert (tmp_path / "outputs" / "a run").exists()


def test_json_tells_what_would_go_and_leaves_it(
    open_runs: OpenRuns, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "outputs" / "a run"
    made_up.run(folder, open_runs, uri)
    made_up.deliver(open_runs)
    (folder / "state-000000010.pt").write_text("a checkpoint")
    assert typed("gc", "--checkpoints", "--json") == 0
    cleared = json.loads(capsys.readouterr().out)
    assert set(cleared) == {"removals", "files", "checkpoints", "kept", "bytes"}
    assert cleared["checkpoints"] == [str(folder / "state-000000010.pt")]
    assert cleared["bytes"] == len("a checkpoint")
    assert typed("gc", "--checkpoints", "--dry-run", "--json", "--yes") == 0
    assert json.loads(capsys.readouterr().out) == cleared
    assert typed("gc", "--checkpoints", "--dry-run") == 0
    assert capsys.readouterr().out.strip() and (folder / "state-000000010.pt").exists()
    assert typed("rm", "last", "--json") == 0
    (removed,) = json.loads(capsys.readouterr().out)
    keys = {"id", "what", "runs", "folders", "files", "stays", "bytes"}
    assert set(removed) == keys and removed["folders"] == [str(folder)]
    assert removed["bytes"] > sum(path.stat().st_size for path in folder.iterdir())
    assert (folder / "state-000000010.pt").exists()
    assert typed("rm", "last", "--json", "--yes") == 0
    assert json.loads(capsys.readouterr().out) == [removed] and not folder.exists()
