"""Tables of runs and of their metrics: every point once, from the store and from journals alike."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

import mnist_exp
from mnist_exp.catalog import tables
from mnist_exp.config import paths
from mnist_exp.errors import ConfigError
from mnist_exp.tracking import journal, mlflow_internals
from mnist_exp.tracking.upload import UploadState
from tests.catalog.recorded import Recorded


@pytest.fixture
def store(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a store with a sweep of two jobs and a run; another run is not in there yet."""
    monkeypatch.setattr(paths, "output_root", lambda: recorded.folder)
    recorded.sweep("s", [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}])
    recorded.run("delivered", {"optimizer.lr": 0.3})
    recorded.deliver()
    recorded.run("waiting", {"optimizer.lr": 0.4}, (0.25, math.nan))
    return [f"tracking.uri={recorded.uri}"]


def told(folder: Path) -> list[tuple[str, int, int, float]]:
    """All points in a journal: key, step, time, value."""
    return [
        (key, entry.fields["step"], entry.time, value)
        for entry in journal.read(folder)[0]
        if entry.kind == "metrics"
        for key, value in entry.fields["values"].items()
    ]


def rows(table: pd.DataFrame) -> list[tuple[str, int, int, float]]:
    times = table["time"].astype("int64")
    return sorted(zip(table["key"], table["step"], times, table["value"], strict=True))


def test_the_history_has_every_point_of_every_journal(store: list[str], recorded: Recorded) -> None:
    table = mnist_exp.history(overrides=store)
    assert list(table.columns) == ["run", "key", "step", "time", "value"]
    assert str(table["time"].dtype) == "datetime64[ms, UTC]"
    records = recorded.load()
    assert set(table["run"]) == {record.id for record in records} and len(records) == 5
    for record in records:
        assert record.folder is not None
        found = rows(table[table["run"] == record.id])
        assert pd.DataFrame(found).equals(pd.DataFrame(sorted(told(record.folder)))), record.name


def test_a_server_is_asked_for_the_same(
    store: list[str], recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = mnist_exp.history(overrides=store)
    monkeypatch.setattr("mnist_exp.tracking.store.database_file", lambda uri: None)
    monkeypatch.setattr("mnist_exp.tracking.store._PART", 2)  # runs in a call
    monkeypatch.setattr(mlflow_internals, "read_runs", None)
    monkeypatch.setattr(mlflow_internals, "read_points", None)
    again = mnist_exp.history(overrides=store)
    order = ["run", "key", "step", "time"]
    pd.testing.assert_frame_equal(
        *(table.sort_values(order, ignore_index=True) for table in (before, again))
    )


def test_a_server_that_fails_meanwhile_is_named(
    store: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise ConnectionError("it is gone")

    monkeypatch.setattr("mnist_exp.tracking.store.database_file", lambda uri: None)
    monkeypatch.setattr("mlflow.MlflowClient.get_metric_history", fails)
    with pytest.raises(ConfigError, match=r"tracking\.uri=.*cannot be read, it is gone"):
        mnist_exp.export(tmp_path / "a.csv", overrides=store)
    assert not (tmp_path / "a.csv").exists()


def test_sweeps_come_with_their_jobs_and_filters_choose(
    store: list[str], recorded: Recorded
) -> None:
    sweep = UploadState.of(recorded.folder / "outputs" / "s").run_id
    assert mnist_exp.history([sweep], overrides=store)["run"].nunique() == 3
    run = UploadState.of(recorded.folder / "outputs" / "delivered").run_id
    assert set(mnist_exp.history([run[:12]], overrides=store)["run"]) == {run}
    assert mnist_exp.history([sweep], ["lr>0.15"], store)["run"].nunique() == 1
    assert mnist_exp.history(filters=["lr>0.15"], overrides=store)["run"].nunique() == 3
    nothing = mnist_exp.history(filters=["lr>9"], overrides=store)
    assert nothing.empty and str(nothing["time"].dtype) == "datetime64[ms, UTC]"


def test_the_formats_hold_the_same(store: list[str], tmp_path: Path) -> None:
    history = mnist_exp.history(overrides=store)
    for suffix in (".csv", ".parquet", ".json"):
        written = mnist_exp.export(tmp_path / f"new/t{suffix}", overrides=store)
        assert isinstance(written, tables.TableFiles)
        assert (written.points, written.records) == (len(history), 5)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"t.csv", "t.runs.csv", "t.parquet", "t.runs.parquet", "t.json"}

    metrics = pd.read_parquet(tmp_path / "new/t.parquet")
    pd.testing.assert_frame_equal(metrics, history)
    from_csv = pd.read_csv(tmp_path / "new/t.csv")
    assert from_csv["time"].str.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00").all()
    from_csv["time"] = pd.to_datetime(from_csv["time"]).dt.as_unit("ms")
    pd.testing.assert_frame_equal(from_csv, history, check_dtype=False)
    content = json.loads((tmp_path / "new/t.json").read_text())
    assert [row["value"] for row in content["metrics"]] == [
        None if math.isnan(value) else value for value in history["value"]
    ]

    runs = pd.read_parquet(tmp_path / "new/t.runs.parquet")
    assert list(runs["id"]) == [run["id"] for run in content["runs"]]
    assert list(runs["params.optimizer.lr"].dropna()) == ["0.4", "0.3", "0.2", "0.1"]
    assert isinstance(runs["started"].dtype, pd.DatetimeTZDtype)
    assert len(pd.read_csv(tmp_path / "new/t.runs.csv")) == 5


def test_a_file_that_exists_is_replaced_only_by_force(store: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.runs.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.runs\.csv exists already.*--force"):
        mnist_exp.export(tmp_path / "a.csv", overrides=store)
    assert (tmp_path / "a.runs.csv").read_text() == "mine" and not (tmp_path / "a.csv").exists()
    mnist_exp.export(tmp_path / "a.csv", overrides=store, force=True)
    assert (tmp_path / "a.runs.csv").read_text() != "mine"


@pytest.mark.parametrize(
    ("name", "words", "filters", "message"),
    [
        ("a.xlsx", [], [], r"must end in \.csv, \.parquet, \.json or \.onnx"),
        ("a.csv", ["nope"], [], "nope: there is no such run or sweep"),
        ("a.csv", [], ["lrr>1"], "lrr: no run has such a field. Did you mean lr"),
        ("a.csv", [], ["lr>9"], "nothing to export"),
        ("a.onnx", [], [], "has to be named"),
        ("a.onnx", ["last", "last"], [], "has to be named"),
        ("file/a.csv", [], [], "cannot be written"),
    ],
)
def test_bad_input_leaves_nothing(
    store: list[str], tmp_path: Path, name: str, words: list[str], filters: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        mnist_exp.export(tmp_path / name, words, filters, store)
    assert sorted(tmp_path.rglob("*")) == before
