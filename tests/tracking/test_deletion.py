"""What a store tells of runs that are to be deleted, where it is a server or busy."""

import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.store.entities.paged_list import PagedList

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import deletion, mlflow_internals
from mnist_exp.tracking.store import Store
from tests.helpers import fresh_store

SERVER = "http://127.0.0.1:9"  # where nobody answers


class Client:
    """MLflow's client of a server with two pages of experiments, a run in each."""

    def __init__(self, *times: int | None) -> None:
        self.times = times

    def search_experiments(
        self, view_type: int, max_results: int = 1, page_token: str | None = None
    ) -> PagedList:
        number = int(page_token or 0)
        experiment = SimpleNamespace(experiment_id=str(number), creation_time=self.times[number])
        more = str(number + 1) if number + 1 < len(self.times) else None
        return PagedList([experiment], more)

    def search_runs(self, experiment_ids: list[str], **options: object) -> PagedList:
        info = SimpleNamespace(run_id="", run_name="", status="FINISHED", experiment_id="")
        info.start_time = info.end_time = info.artifact_uri = None
        data = SimpleNamespace(tags={}, params={}, metrics={}, _metric_objs=[])
        entities = []
        for number in experiment_ids:
            own = SimpleNamespace(**{**vars(info), "run_id": f"run {number}"})
            entities.append(SimpleNamespace(info=own, data=data, inputs=None))
        return PagedList(entities, None)

    def search_model_versions(self, condition: str) -> list[SimpleNamespace]:
        if condition != "run_id='registered'":
            return []
        return [SimpleNamespace(name="digits", version="3")]


def server(monkeypatch: pytest.MonkeyPatch, *times: int | None) -> None:
    monkeypatch.setattr(deletion, "check_store", lambda uri: None)
    monkeypatch.setattr(Store, "client", Client(*times))


@pytest.mark.parametrize("times, made", [((7, 5), 5), ((None, 5), 5), ((None, None), None)])
def test_a_server_was_made_when_its_first_experiment_was(
    times: tuple[int | None, int | None], made: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pages of its experiments are read, and so are the runs in all of them."""
    server(monkeypatch, *times)
    assert deletion.ids_in(SERVER) == ({"run 0", "run 1"}, made)


def test_a_server_tells_which_models_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    server(monkeypatch, 0)
    runs = [SimpleNamespace(id="not"), SimpleNamespace(id="registered")]
    assert deletion.registered_models(Store(SERVER), runs) == [  # type: ignore[arg-type]
        "digits version 3"
    ]


def test_a_database_that_is_locked_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_internals, "LOCK_SECONDS", 0.01)
    uri = fresh_store(tmp_path)
    run = SimpleNamespace(id="a run", artifact_uri="")
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for ask in (deletion.files_of, lambda store, run: deletion.registered_models(store, [run])):
            with pytest.raises(ConfigError, match="locked"):
                ask(Store(uri), run)  # type: ignore[arg-type]
