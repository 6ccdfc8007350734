"""Notes and tags: in the journal and in MLflow, whether a run has ended or is being trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

import mnist_exp
from mnist_exp.catalog import annotate
from mnist_exp.config import paths
from mnist_exp.errors import ConfigError
from mnist_exp.tracking import journal, run_log, waiting
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.notes import DESCRIPTION, NOTE
from mnist_exp.tracking.run_log import RunWriter
from mnist_exp.tracking.upload import UploadState
from tests.catalog.recorded import Recorded

OWN = "To train it again: ..."


@pytest.fixture
def store(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for the store; the registry of open runs is that of the records."""
    monkeypatch.setattr(paths, "output_root", lambda: recorded.folder)
    return [f"tracking.uri={recorded.uri}"]


def in_mlflow(recorded: Recorded, name: str) -> dict[str, str]:
    """The tags of a run in the store."""
    run_id = UploadState.of(recorded.folder / "outputs" / name).run_id
    return dict(mlflow.MlflowClient(recorded.uri).get_run(run_id).data.tags)


def test_a_note_is_in_the_journal_in_mlflow_and_before_the_description(
    store: list[str], recorded: Recorded
) -> None:
    recorded.run("a", {}, tags={DESCRIPTION: OWN})
    recorded.deliver()
    for text in ("first", "second, *longer*"):
        changed = mnist_exp.note("last", text, store)
        assert (changed.note, changed.waits) == (text, "")
        wanted = {NOTE: text, DESCRIPTION: f"{text}\n\n{OWN}"}
        assert wanted.items() <= in_mlflow(recorded, "a").items()
        assert wanted.items() <= RunHistory.of(recorded.folder / "outputs/a").tags.items()
    assert mnist_exp.note("last", overrides=store).note == "second, *longer*"
    (record,) = mnist_exp.runs(filters=["note~LONGER"], overrides=store)["note"]
    assert record == "second, *longer*"
    mnist_exp.note("last", "", store)
    assert {NOTE: "", DESCRIPTION: OWN}.items() <= in_mlflow(recorded, "a").items()
    assert recorded.open_runs.entries() == []
    assert RunHistory.of(recorded.folder / "outputs/a").status == "FINISHED"


def test_a_description_that_was_edited_in_mlflow_stays(
    store: list[str], recorded: Recorded
) -> None:
    recorded.run("a", {}, tags={DESCRIPTION: OWN})
    recorded.deliver()
    run_id = UploadState.of(recorded.folder / "outputs/a").run_id
    mlflow.MlflowClient(recorded.uri).set_tag(run_id, DESCRIPTION, "by hand")
    mnist_exp.note(run_id, "mine", store)
    assert in_mlflow(recorded, "a")[DESCRIPTION] == "mine\n\nby hand"


def test_a_run_in_training_gets_them_by_its_own_journal(
    store: list[str], recorded: Recorded
) -> None:
    writer = recorded.run("a", {}, end="", tags={DESCRIPTION: OWN})
    mnist_exp.note("last", "while it runs", store)
    mnist_exp.tag("last", {"team": "vision"}, store)
    entry = mnist_exp.runs(filters=["team=vision"], overrides=store).iloc[0]
    assert (entry["status"], entry["note"]) == ("RUNNING", "while it runs")
    writer.metrics({"train/loss": 0.1}, 3)  # its own process goes on undisturbed
    writer.end("FINISHED")
    assert journal.read(writer.folder)[1] == []
    recorded.deliver()
    tags = in_mlflow(recorded, "a")
    assert tags["team"] == "vision" and tags[DESCRIPTION] == f"while it runs\n\n{OWN}"


def test_a_run_that_ends_meanwhile(
    store: list[str], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its uploader may have looked for the last time before there was a tag."""
    writer = recorded.run("a", {}, end="")
    monkeypatch.setattr(annotate, "add_tags", after(lambda: writer.end("FINISHED")))
    assert mnist_exp.tag("last", {"team": "vision"}, store).waits == ""
    assert in_mlflow(recorded, "a")["team"] == "vision"


def after(first: Callable[[], None]) -> Callable[..., Any]:
    """What adds tags once something else has happened."""
    add_tags = run_log.add_tags

    def both(*arguments: Any) -> Any:
        first()
        return add_tags(*arguments)

    return both


def test_a_run_that_is_resumed_keeps_its_note(store: list[str], recorded: Recorded) -> None:
    writer = recorded.run("a", {}, end="KILLED", tags={DESCRIPTION: OWN})
    mnist_exp.note("last", "why it was stopped", store)
    again = RunWriter.begin(
        writer.folder,
        recorded.open_runs,
        name="a",
        uri=recorded.uri,
        experiment="tests",
        tags={DESCRIPTION: OWN},
    )
    again.end("FINISHED")
    recorded.deliver()
    assert in_mlflow(recorded, "a")[DESCRIPTION] == f"why it was stopped\n\n{OWN}"
    assert mnist_exp.note("last", overrides=store).note == "why it was stopped"


def test_a_run_whose_folder_is_elsewhere_gets_them_in_the_store(
    store: list[str], recorded: Recorded
) -> None:
    writer = recorded.run("a", {}, tags={DESCRIPTION: OWN})
    recorded.deliver()
    moved = recorded.folder / "elsewhere"
    (recorded.folder / "outputs/a").rename(moved)
    changed = mnist_exp.note("last", "from afar", store)
    assert changed.waits == "" and not writer.folder.exists()
    assert mnist_exp.tag("last", {"team": "vision"}, store).tags["team"] == "vision"
    run_id = UploadState.of(moved).run_id
    tags = mlflow.MlflowClient(recorded.uri).get_run(run_id).data.tags
    assert (tags[DESCRIPTION], tags["team"]) == (f"from afar\n\n{OWN}", "vision")


def test_what_a_store_does_not_take_is_kept_for_it(
    store: list[str], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.run("a", {})
    recorded.deliver()
    with monkeypatch.context() as patched:
        refused = {recorded.folder / "outputs/a": "it is down"}
        patched.setattr(waiting, "deliver", lambda *_: (0, refused))
        assert mnist_exp.tag("last", {"team": "vision"}, store).waits == "it is down"
    assert "team" not in in_mlflow(recorded, "a")
    recorded.deliver()
    assert in_mlflow(recorded, "a")["team"] == "vision"


def test_sweeps_and_their_jobs(store: list[str], recorded: Recorded) -> None:
    recorded.sweep("s", [{"seed": 0}, {"seed": 1}])
    recorded.deliver()
    mnist_exp.tag("last", {"stage": "a"}, store)
    assert in_mlflow(recorded, "s")["stage"] == "a"
    mnist_exp.tag(UploadState.of(recorded.folder / "outputs/s/1").run_id, {"stage": "b"}, store)
    assert in_mlflow(recorded, "s/1")["stage"] == "b" and "stage" not in in_mlflow(recorded, "s/0")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"fine": "x", "threads": "2"}, "threads=2: a tag of this name is the program's own"),
        ({"note": "x"}, "cannot be given"),
        ({"mlflow.runName": "x"}, "cannot be given"),
        ({"a@b": "x"}, "letters, digits"),
        ({"a": "v" * 8001}, "8001 characters, and MLflow takes 8000"),
    ],
)
def test_what_mlflow_would_refuse_changes_nothing(
    store: list[str], recorded: Recorded, tags: dict[str, str], message: str
) -> None:
    writer = recorded.run("a", {})
    before = (writer.folder / journal.NAME).read_bytes()
    with pytest.raises(ConfigError, match=message):
        mnist_exp.tag("last", tags, store)
    assert (writer.folder / journal.NAME).read_bytes() == before


def test_a_note_that_is_too_long(store: list[str], recorded: Recorded, tmp_path: Path) -> None:
    writer = recorded.run("a", {}, tags={DESCRIPTION: OWN})
    before = (writer.folder / journal.NAME).read_bytes()
    with pytest.raises(ConfigError, match=r"n\.\.\.'.*8024 characters, and MLflow takes 8000"):
        mnist_exp.note("last", "n" * 8000, store)
    assert (writer.folder / journal.NAME).read_bytes() == before
