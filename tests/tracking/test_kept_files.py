"""Artifacts that have moved: their place is named, and the run's folder is used if whole."""

import logging
import shutil
from pathlib import Path

import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import kept_files, waiting
from mnist_exp.tracking.run_log import OpenRuns, RunWriter
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState
from tests.helpers import fresh_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run whose store has moved since it was recorded there."""
    folder, open_runs = tmp_path / "run", OpenRuns(tmp_path / "open")
    (folder / "pictures").mkdir(parents=True)
    writer = RunWriter.begin(
        folder,
        open_runs,
        name="a run",
        uri=fresh_store(tmp_path / "first"),
        experiment="moved",
        tags={"output_dir": str(folder)},
    )
    writer.text("an old text", "config.yaml")
    writer.text("seed: 0", "config.yaml")
    for name in ("a.pt", "b.pt"):
        (folder / "pictures" / name).write_text(f"content of {name}")
        writer.artifact(folder / "pictures" / name, "checkpoint")
    writer.end("FINISHED")
    assert waiting.deliver(open_runs) == (1, {})
    (tmp_path / "first").rename(tmp_path / "second")
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/second/store.db")


def test_the_folder_is_used_where_the_artifacts_have_moved(
    folder: Path, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = UploadState.of(folder).run_id
    assert store.has(run_id, "config.yaml") and not store.has(run_id, "other.txt")
    with caplog.at_level(logging.WARNING):
        assert store.fetch(run_id, "config.yaml", tmp_path / "a").read_text() == "seed: 0"
    (message,) = caplog.messages
    assert str(folder) in message and f"{tmp_path}/first/mlruns" in message
    copied = store.fetch(run_id, "checkpoint", tmp_path / "b")
    assert {path.name: path.read_text() for path in copied.iterdir()} == {
        "a.pt": "content of a.pt",
        "b.pt": "content of b.pt",
    }


def test_not_where_it_is_not_whole_or_has_changed(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    run_id = UploadState.of(folder).run_id
    (folder / "config.yaml").write_text("seed: 1")
    (folder / "pictures" / "b.pt").unlink()
    for name in ("config.yaml", "checkpoint"):
        with pytest.raises(ConfigError) as raised:
            store.fetch(run_id, name, tmp_path / "copy")
        text = str(raised.value)
        assert f"no artifact {name} in file://{tmp_path}/first/mlruns" in text
        assert f"nor one as it was recorded in its folder, {folder}" in text
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="nor one as it was recorded"):
        store.fetch(run_id, "config.yaml", tmp_path / "copy")


def test_not_where_the_folder_is_another_run_s(folder: Path, store: Store, tmp_path: Path) -> None:
    key = store.get(UploadState.of(folder).run_id).key
    names = {"config.yaml", "checkpoint/a.pt", "checkpoint/b.pt"}
    assert set(kept_files.recorded_files(folder, key)) == names
    for other in ("another", ""):
        assert list(kept_files.recorded_files(folder, other)) == []
    assert kept_files.copy(folder, "another", "config.yaml", tmp_path) is None


def test_what_cannot_be_put_into_its_place_is_told(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    """And no new one is made where the old one was."""
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be put among its artifacts in"):
        store.put(UploadState.of(folder).run_id, folder / "config.yaml")
    assert not (tmp_path / "first").exists()


def test_what_cannot_be_copied_from_the_folder_is_told(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "copy" / "config.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{folder}, cannot be copied \(Is a directory\)"):
        store.fetch(UploadState.of(folder).run_id, "config.yaml", tmp_path / "copy")


def test_the_folder_is_looked_at_where_a_server_lists_no_artifacts(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError("no bucket")

    monkeypatch.setattr(store, "database", None)
    monkeypatch.setattr(store.client, "list_artifacts", failing)
    run_id = UploadState.of(folder).run_id
    assert store.has(run_id, "config.yaml") and not store.has(run_id, "other.txt")
