"""Runs while they are trained, and after they are of use: what runs, ending it, removing it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mnist_exp.catalog.activity import Status, Stopped
    from mnist_exp.catalog.garbage import GarbagePlan
    from mnist_exp.catalog.records import Record
    from mnist_exp.catalog.remove import RemovalPlan
    from mnist_exp.tracking.run_log import OpenRuns
    from mnist_exp.tracking.store import Store


def status(sweep: str | None = None) -> "Status":
    """Return what is being trained on this machine now, whatever store it is for.

    No store is asked, as the journals tell all.

    Args:
        sweep: The sweep, or the run, that alone is meant.

    Raises:
        ConfigError: Nothing that runs now is named so.
    """
    from mnist_exp.catalog.activity import Status, activities, choose
    from mnist_exp.run import lookup

    running = activities(lookup.open_runs())
    return Status(running) if sweep is None else Status(choose(running, sweep), unfolded=True)


def stop(run: str = "last", overrides: Sequence[str] = (), *, seconds: float = 60.0) -> "Stopped":
    """Let a run or a sweep of another process end with a checkpoint, as by Ctrl-C.

    Return it once its record has ended. `resume` goes on with it.

    Args:
        run: The run, or the sweep; `last` is the newest one that runs.
        overrides: `tracking.uri=...` alone, the store to look into.
        seconds: How long to wait for the end of its record.

    Raises:
        ConfigError: There is no such run, or it is not running here. Nothing has been changed.
        RunFailed: It has been asked to end, and has not ended after so many seconds.
    """
    from mnist_exp.api.catalog import load_records
    from mnist_exp.catalog import activity
    from mnist_exp.catalog.records import find, load_open_records
    from mnist_exp.run import lookup

    open_records = load_open_records(lookup.open_runs())
    if overrides:  # then a run of another store is not meant
        open_records, _ = load_records(overrides)
    at_work = [record for record in open_records if record.is_at_work]
    if run == "last" and (running := [record for record in at_work if record.kind != "job"]):
        meant = find(running, run)
    else:
        meant = _find(run, open_records, overrides)
    activity.check_stoppable(meant, at_work)
    return activity.stop(meant, seconds)


def plan_removal(runs: Sequence[str], overrides: Sequence[str] = ()) -> "RemovalPlan":
    """Return what `rm` would remove, without removing anything.

    Args:
        runs: Runs and sweeps. A sweep goes with its jobs.
        overrides: `tracking.uri=...` alone, the store to look into.

    Raises:
        ConfigError: One of them is not there, is a job of a sweep, or may be trained just now.
    """
    from mnist_exp.catalog import remove
    from mnist_exp.errors import check_list

    check_list("runs", runs)
    records, store, open_runs = _load_all(overrides)
    return remove.plan(runs, records, store, open_runs, overrides)


def rm(runs: Sequence[str], overrides: Sequence[str] = ()) -> "RemovalPlan":
    """Remove runs and sweeps for good: folders, artifacts and rows. Return what was removed.

    Nobody is asked. `plan_removal` tells before what would go. An interrupted removal goes on when
    it is called again. The arguments are those of `plan_removal`.

    Raises:
        ConfigError: As `plan_removal` does. Nothing has been removed.
        RunFailed: Not all of it could be removed.
    """
    plan = plan_removal(runs, overrides)
    plan.carry_out()
    return plan


def plan_gc(overrides: Sequence[str] = (), *, checkpoints: bool = False) -> "GarbagePlan":
    """Return what `gc` would clear, without clearing anything.

    Args:
        overrides: `tracking.uri=...` alone, the store whose deleted runs are meant.
        checkpoints: Also the checkpoints of finished runs, but for their models.

    Raises:
        ConfigError: The store or the folders cannot be read.
    """
    from mnist_exp.catalog import garbage

    records, store, open_runs = _load_all(overrides)
    return garbage.plan(records, store, open_runs, checkpoints=checkpoints, typed=overrides)


def gc(
    overrides: Sequence[str] = (), *, checkpoints: bool = False, dry_run: bool = False
) -> "GarbagePlan":
    """Clear what is of no more use, and return what that was. Nobody is asked.

    The arguments are those of `plan_gc`. With `dry_run`, nothing is cleared.

    Raises:
        ConfigError: As `plan_gc` does. Nothing has been cleared.
        RunFailed: Not all of it could be cleared.
    """
    plan = plan_gc(overrides, checkpoints=checkpoints)
    if not dry_run:
        plan.carry_out()
    return plan


def _load_all(overrides: Sequence[str]) -> "tuple[list[Record], Store | None, OpenRuns]":
    """Return all records, the store if there is one yet, and the registry of open runs.

    A server has to answer, as what waits for it is not all: a sweep would go without the jobs that
    only the server has. Raises ConfigError.
    """
    from mnist_exp.catalog.records import load_records
    from mnist_exp.run import lookup
    from mnist_exp.tracking.store import Store, has_runs

    uri, open_runs = lookup.store_uri(overrides), lookup.open_runs()
    store = Store(uri) if has_runs(uri) else None
    return load_records(uri, open_runs, required=True), store, open_runs


def _find(word: str, open_records: "Sequence[Record]", overrides: Sequence[str]) -> "Record":
    """Return the record that a person means: an open one, of whatever store, or one of the store.

    Only where `last` or what is in no registry is meant, the store is asked.
    """
    from mnist_exp.api.catalog import load_records
    from mnist_exp.catalog.records import find
    from mnist_exp.errors import ConfigError

    if word != "last":
        try:
            return find(open_records, word)
        except ConfigError:
            pass  # the message below knows of all runs
    stored, _ = load_records(overrides)
    keys = {record.key for record in stored if record.key}
    everything = [*stored, *(record for record in open_records if record.key not in keys)]
    everything.sort(key=lambda record: -record.start_time)
    return find(everything, word)
