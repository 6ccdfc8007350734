"""Records that wait for a store: delivered, brought to another one, given up, and told of once."""

import logging
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import journal, waiting
from mnist_exp.tracking.journal import Journal, RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState
from tests.faults.delivery import begin, faults_in, whole
from tests.helpers import fresh_store


@pytest.fixture
def open_runs(tmp_path: Path) -> OpenRuns:
    return OpenRuns(tmp_path / "open")


@pytest.fixture
def gone(tmp_path: Path) -> str:
    """The address of a store whose folder is no more."""
    return f"sqlite:///{tmp_path}/gone/store.db"


def keys(open_runs: OpenRuns) -> list[str]:
    return [run.folder.name for run in open_runs.entries()]


def test_what_cannot_be_delivered_is_told_once_and_never_again(
    open_runs: OpenRuns, gone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        whole(tmp_path / f"run{number}", open_runs, gone)
    with caplog.at_level(logging.WARNING):
        waiting.deliver_to(open_runs, gone)
        (message,) = caplog.messages
        assert "and 2 more: not in MLflow yet: " in message and "no folder" in message
        assert message.endswith("mnist-exp sync")
        waiting.deliver_to(open_runs, gone)
        assert len(caplog.messages) == 1
        whole(tmp_path / "later", open_runs, gone)
        waiting.deliver_to(open_runs, gone)
        assert len(caplog.messages) == 2 and f"{tmp_path}/later: not" in caplog.messages[1]
    count, reasons = waiting.deliver(open_runs)  # who asks is told of each
    assert count == 0 and len(reasons) == 4


def test_a_run_is_brought_to_another_store(open_runs: OpenRuns, gone: str, tmp_path: Path) -> None:
    folder, uri = tmp_path / "run", fresh_store(tmp_path)
    whole(folder, open_runs, gone)
    whole(tmp_path / "other", open_runs, gone)
    assert waiting.redirect(open_runs, [folder], uri) == [folder]
    assert waiting.deliver(open_runs, [folder]) == (1, {})
    assert faults_in(folder, uri) == [] and keys(open_runs) == ["other"]
    assert RunHistory.of(folder).uri == uri  # where it is resumed, and looked for
    assert waiting.redirect(open_runs, [], uri) == [tmp_path / "other"]  # all that waits
    assert waiting.deliver(open_runs) == (1, {}) and keys(open_runs) == []
    assert waiting.redirect(open_runs, [], uri) == []


def test_a_sweep_is_brought_there_as_a_whole(open_runs: OpenRuns, tmp_path: Path) -> None:
    """With the jobs that its first store has, and in whatever folders they are."""
    first, second = fresh_store(tmp_path / "first"), fresh_store(tmp_path / "second")
    sweep = tmp_path / "sweep"
    parent = begin(sweep, open_runs, first)
    begin(sweep / "0", open_runs, first, parent=sweep).end("FINISHED")
    assert waiting.deliver(open_runs, [sweep / "0", sweep])[1] == {}
    begin(sweep / "a" / "1", open_runs, first, parent=sweep).end("FINISHED")
    parent.end("FINISHED")
    shutil.rmtree(tmp_path / "first")
    assert len(waiting.deliver(open_runs)[1]) == 2  # the first job is nowhere any more
    with pytest.raises(ConfigError, match=f"job of a sweep. Name the sweep: {sweep}"):
        waiting.redirect(open_runs, [sweep / "a" / "1"], second)
    assert waiting.redirect(open_runs, [], second) == [sweep]
    assert waiting.deliver(open_runs) == (3, {})
    store = Store(second)
    parent_id = UploadState.of(sweep).run_id
    jobs = [UploadState.of(folder).run_id for folder in (sweep / "0", sweep / "a" / "1")]
    assert [store.get(run_id).parent for run_id in jobs] == [parent_id] * 2


def test_what_is_given_up_no_longer_waits_and_keeps_its_record(
    open_runs: OpenRuns, gone: str, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    begin(sweep, open_runs, gone).end("KILLED")
    begin(sweep / "0", open_runs, gone, parent=sweep).end("FINISHED")
    whole(tmp_path / "other", open_runs, gone)
    waiting.deliver_to(open_runs, gone)
    assert waiting.forget(open_runs, [sweep]) == 2
    assert keys(open_runs) == ["other"] and RunHistory.of(sweep / "0").status == "FINISHED"
    with pytest.raises(ConfigError, match="nothing there waits"):
        waiting.forget(open_runs, [sweep])
    uri = fresh_store(tmp_path)
    assert waiting.redirect(open_runs, [sweep], uri) == [sweep]  # after all
    assert waiting.deliver(open_runs, [sweep]) == (2, {})
    assert waiting.forget(open_runs, [tmp_path / "other"]) == 1
    assert [*open_runs.folder.iterdir()] == []
    count, reasons = waiting.deliver(open_runs, [tmp_path / "other"])  # named: it waits again
    assert (count, list(reasons)) == (0, [tmp_path / "other"])


def test_folders_that_are_gone_or_damaged_are_named_and_can_be_given_up(
    open_runs: OpenRuns, gone: str, tmp_path: Path
) -> None:
    for name in ("removed", "emptied", "damaged"):
        whole(tmp_path / name, open_runs, gone)
    shutil.rmtree(tmp_path / "removed")
    (tmp_path / "emptied" / journal.NAME).unlink()
    path = tmp_path / "damaged" / journal.NAME
    path.write_bytes(b"x" + path.read_bytes())
    _, reasons = waiting.deliver(open_runs)
    assert {folder.name: reason for folder, reason in reasons.items()} == {
        "removed": "the folder is not there",
        "emptied": "there is no journal.jsonl",
        "damaged": "the first line of its journal.jsonl is damaged",
    }
    with pytest.raises(ConfigError, match="removed: it holds no record"):
        waiting.redirect(open_runs, [tmp_path / "removed"], fresh_store(tmp_path))
    assert waiting.forget(open_runs, list(reasons)) == 3
    assert waiting.deliver(open_runs) == (0, {})
    with pytest.raises(ConfigError, match="removed: it holds no record"):
        waiting.deliver(open_runs, [tmp_path / "removed"])


def test_a_run_that_is_trained_is_left_alone(
    open_runs: OpenRuns, gone: str, tmp_path: Path
) -> None:
    writer = begin(tmp_path / "run", open_runs, gone)
    for call in (
        lambda: waiting.redirect(open_runs, [], fresh_store(tmp_path)),
        lambda: waiting.forget(open_runs, [tmp_path / "run"]),
    ):
        with pytest.raises(ConfigError, match="is at work on it"):
            call()
    assert keys(open_runs) == ["run"] and RunHistory.of(tmp_path / "run").uri == gone
    writer.journal.close()


def test_another_store_that_will_not_take_it_is_refused(
    open_runs: OpenRuns, gone: str, tmp_path: Path
) -> None:
    whole(tmp_path / "run", open_runs, gone)
    size = journal.size(tmp_path / "run")
    for uri in (gone, "nonsense"):
        with pytest.raises(ConfigError, match=f"--to {uri}: "):
            waiting.redirect(open_runs, [tmp_path / "run"], uri)
    assert journal.size(tmp_path / "run") == size


def test_an_old_reader_of_a_journal_passes_over_the_other_store(tmp_path: Path) -> None:
    """As an entry of a kind that is not known is passed over."""
    with closing(Journal(tmp_path)) as file:
        file.write("begin", key="a", uri="one", owner={}, tags={})
        file.write("of the future", what=1)
        file.write("store", uri="two")
    assert RunHistory.of(tmp_path).uri == "two"
