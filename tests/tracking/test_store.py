"""A store is opened, or refused, and never half made."""

import math
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag

from mnist_exp.errors import ConfigError
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import StoredRun
from tests.helpers import fresh_store


def test_a_database_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_store(tmp_path / "other")  # MLflow warns of itself at first use
    uri = f"sqlite:///{tmp_path}/new.db"

    def killed(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mlflow.MlflowClient, "search_experiments", killed)
        Store(uri)
    assert not (tmp_path / "new.db").exists()
    check_store(uri)
    (tmp_path / "new.db.a.part").write_bytes(b"half of it")
    (tmp_path / "new.db.a.part-journal").write_bytes(b"half of it")
    assert Store(uri).client.search_experiments()
    assert {p.name for p in tmp_path.iterdir()} == {"new.db", "new.db.lock", "other"}


# as this program writes it, and as another one may
PROFILES = ('{"image": [1, 28, 28], "train": 55000, "test": 10000}', "some text")


def test_what_is_read_from_the_tables_is_what_mlflow_returns(tmp_path: Path) -> None:
    """Runs, metrics (not a number as well), data sets and files; deleted runs are left out."""
    store = Store(fresh_store(tmp_path))
    client, experiment = store.client, store.experiment("first")
    parent = client.create_run(experiment, 1000, {"sweep": "true"}, "sweep")
    for number, other in enumerate((experiment, store.experiment("second"))):
        tags = {"job": str(number), "mlflow.parentRunId": parent.info.run_id}
        run_id = client.create_run(other, 2000 + number, tags, f"job {number}").info.run_id
        for step, value in enumerate((0.5, math.nan, math.inf, 0.25)):
            client.log_metric(run_id, "train/loss", value, timestamp=step, step=step)
        tag = InputTag("sha256", f"digest{number}")
        entity = Dataset("mnist", "12345678", "local", "{}", profile=PROFILES[number])
        client.log_inputs(run_id, [DatasetInput(entity, [tag])])
    deleted = client.create_run(experiment, 3000, {}, "deleted").info.run_id
    client.delete_run(deleted)

    read = Store(store.uri)  # which need not ask MLflow
    assert [run.name for run in read.of_kind(None)] == ["job 1", "job 0", "sweep"]
    assert [run.name for run in read.of_kind(True)] == ["sweep"]
    assert [run.name for run in read.of_kind(False)] == ["job 1", "job 0"]
    assert [run.name for run in read.children(parent.info.run_id).values()] == ["job 0", "job 1"]
    sizes = [run.dataset_sizes for run in read.of_kind(None)]
    assert sizes == [{}, {"train": 55000, "test": 10000}, {}]
    for run in (*read.of_kind(None), read.get(deleted)):
        recorded = client.get_run(run.id)
        assert run == StoredRun.from_entity(store.uri, recorded)
        for key in run.metrics:
            points = [(m.step, m.value) for m in client.get_metric_history(run.id, key)]
            assert repr(read.history(run.id, key)) == repr(points)
    assert "client" not in vars(read)
    with pytest.raises(ConfigError, match=r"^nobody: there is no such run in sqlite"):
        read.get("nobody")


def test_files_of_a_run_are_where_mlflow_looks_for_them(tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    run_id = store.client.create_run(store.experiment("first")).info.run_id
    file, read = tmp_path / "a.txt", Store(store.uri)
    file.write_text("text")
    read.put(run_id, file)
    store.client.log_artifact(run_id, str(file), "folder")
    assert [f.path for f in store.client.list_artifacts(run_id)] == ["a.txt", "folder"]
    assert read.has(run_id, "folder") and not read.has(run_id, "b.txt")
    assert read.fetch(run_id, "a.txt", tmp_path / "folder").read_text() == "text"
    assert (read.fetch(run_id, "folder", tmp_path) / "a.txt").read_text() == "text"
    with pytest.raises(ConfigError, match=rf"^run {run_id}: it has no artifact b.txt"):
        read.fetch(run_id, "b.txt", tmp_path)
    assert "client" not in vars(read)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    (tmp_path / "store.db").write_bytes(b"no database" * 100)
    for read in (store.get, lambda run_id: store.history(run_id, "train/loss")):
        with pytest.raises(ConfigError, match=r"store\.db: cannot be read, file is not a database"):
            read("a run")
