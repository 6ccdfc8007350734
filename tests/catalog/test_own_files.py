"""What is of a run and may go with it, whatever its record says."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mnist_exp import api
from mnist_exp.catalog.own_files import evaluation_of
from mnist_exp.errors import ConfigError
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.tracking import journal, waiting
from mnist_exp.tracking.journal import Journal, RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from tests.catalog import made_up
from tests.catalog.made_up import deliver, kept, run_id
from tests.helpers import fresh_store


def rekey(folder: Path, open_runs: OpenRuns, key: str) -> None:
    """Write a key that no program makes into the record of a run that waits for its store."""
    entries, _ = journal.read(folder)
    open_runs.remove(RunHistory.of(folder).key)
    (folder / journal.NAME).unlink()
    with closing(Journal(folder)) as file:
        for entry in entries:
            file.write(
                entry.kind, **(entry.fields | ({"key": key} if "key" in entry.fields else {}))
            )
    open_runs.add("f" * 32, folder, entries[0].fields["owner"])


@pytest.mark.parametrize("key", ["{tmp}/precious", "../../../precious", "a key", ""])
def test_no_path_is_made_of_a_damaged_key(
    key: str, open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    made_up.run(outputs / "run", open_runs, uri)
    rekey(outputs / "run", open_runs, key.format(tmp=tmp_path))
    before = kept(tmp_path)
    with pytest.raises(ConfigError):
        api.rm([str(outputs / "run")], [f"tracking.uri={uri}"])
    assert api.gc([f"tracking.uri={uri}"]).is_empty
    assert kept(tmp_path) == before


@pytest.mark.parametrize("key", ["{tmp}/precious", "a key"])
def test_a_sweep_with_a_job_whose_key_is_damaged_stays(
    key: str, open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.sweep(outputs / "sweep", open_runs, uri, jobs=2)
    deliver(open_runs)
    rekey(outputs / "sweep" / "1", open_runs, key.format(tmp=tmp_path))
    open_runs.remove("f" * 32)
    before = kept(outputs / "sweep")
    plan = api.plan_removal([run_id(outputs / "sweep")], [f"tracking.uri={uri}"])
    assert any("is damaged" in line for line in plan.lines())
    plan.carry_out()
    after = kept(outputs / "sweep")
    assert {name: before[name] for name in after} == after and "1/journal.jsonl" in after


@pytest.mark.parametrize("act", [api.rm, lambda _, overrides: api.gc(overrides)])
def test_no_path_is_made_of_a_damaged_id(
    act: Callable[..., object], open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    """Its first eight characters lead from the folder of evaluations to another run."""
    made_up.run(outputs / "victi", open_runs, uri)
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    (outputs / "evaluations").mkdir()
    (outputs / ".removed").mkdir()
    if act is not api.rm:
        Store(uri).client.delete_run(run_id(outputs / "run"))
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            changed = f"UPDATE {table} SET run_uuid = '../victi' WHERE run_uuid = ?"
            database.execute(changed, (run_id(outputs / "run"),))
    before = kept(tmp_path)
    if act is api.rm:
        with pytest.raises(ConfigError, match="32 digits"):
            act(["../victi"], [f"tracking.uri={uri}"])
    else:
        act([], [f"tracking.uri={uri}"])  # in which the folder of this run has none any more
    after = kept(tmp_path)
    assert {name: before[name] for name in after} == after
    assert "outputs/victi/journal.jsonl" in after and len(Store(uri).everything()) == 2


def test_the_evaluation_of_a_run_whose_id_begins_alike_stays(
    open_runs: OpenRuns, outputs: Path
) -> None:
    mine, other = "0123456789abcdef" * 2, "01234567" + "0" * 24
    folder = KeptPredictions(other, "", ["a", "b"], [0, 1], [0, 1]).save().parent
    assert evaluation_of(other) == folder and evaluation_of(mine) is None


def test_what_waits_for_another_store_stays(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.sweep(outputs / "sweep", open_runs, uri, jobs=1)
    deliver(open_runs)
    word = run_id(outputs / "sweep")
    waiting.redirect(open_runs, [outputs / "sweep"], fresh_store(tmp_path / "other"))
    before, entries = kept(outputs), open_runs.entries()
    plan = api.plan_removal([word], [f"tracking.uri={uri}"])
    assert sum("other/store.db by now" in line for line in plan.lines()) == 1
    plan.carry_out()
    assert kept(outputs) == before and open_runs.entries() == entries
    assert Store(uri).everything() == []


def test_what_another_program_has_nested_in_a_run_stays(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    client, parent = Store(uri).client, run_id(outputs / "run")
    experiment = client.get_run(parent).info.experiment_id
    nested = client.create_run(experiment, tags={"mlflow.parentRunId": parent}, run_name="mine")
    plan = api.plan_removal([parent], [f"tracking.uri={uri}"])
    assert any(line.startswith(f"  stays: {nested.info.run_id[:8]}") for line in plan.lines())
    plan.carry_out()
    assert [run.id for run in Store(uri).everything()] == [nested.info.run_id]
