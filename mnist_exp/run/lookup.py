"""Which store and which data a command looks into, by the overrides that were typed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mnist_exp.config import paths
from mnist_exp.config.overrides import tracking_uri
from mnist_exp.errors import ConfigError, check_list
from mnist_exp.tracking import address, waiting
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns, open_runs_at
from mnist_exp.tracking.store import Store, has_runs
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.tracking.uploader import Uploader


def open_runs() -> OpenRuns:
    """Return the registry of the project's runs that are not both ended and uploaded."""
    return open_runs_at(paths.output_root())


def dataset_root(overrides: Sequence[str]) -> str | None:
    """Return the folder that a run's data has moved to, if an override names it."""
    roots = [word for word in overrides if word.startswith("dataset.root=")]
    if not roots:
        return None

    from mnist_exp.config.compose import compose

    root: str | None = compose(roots).dataset.root
    return root


def store_uri(overrides: Sequence[str], *, data: bool = False, required: bool = True) -> str:
    """Return the URI of the store to look into, which is nearly all that an override can change.

    Args:
        overrides: Overrides of a command that goes by the record of a run.
        data: They may also name the folder of the run's data.
        required: A server has to answer.

    Raises:
        ConfigError: An override would change nothing, or the store cannot be opened.
    """
    check_list("overrides", overrides)
    known = ("tracking.uri=", "dataset.root=") if data else ("tracking.uri=",)
    for override in overrides:
        if not override.startswith(known):
            more = ", and dataset.root=FOLDER, where its data is" if data else ""
            raise ConfigError(
                f"{override}: it would change nothing here. What can be said is tracking.uri=..., "
                f"the store{more}"
            )
    typed_uri = tracking_uri(overrides)
    address.warn_if_environment_wins(typed_uri)
    uri = address.store_uri(typed_uri, paths.output_root())
    check_store(uri, required=required)
    return uri


@contextmanager
def uploading(folder: Path) -> Iterator[Uploader]:
    """Yield an uploader for a run or sweep.

    Where the block trains nothing, all that waits for the store of it is uploaded at the end. That
    is so where it has ended, or cannot be gone on with.
    """
    try:
        with Uploader() as uploader:
            yield uploader
    except ConfigError:
        waiting.deliver_to(open_runs(), RunHistory.of(folder).uri)
        raise
    if not uploader.folders:
        waiting.deliver_to(open_runs(), RunHistory.of(folder).uri)


def sync(
    folders: Sequence[str | Path], *, to: str | None, forget: bool
) -> tuple[int, dict[Path, str]]:
    """Deliver the records that wait, or give them up, as `mnist_exp.sync` does."""
    check_list("folders", folders)
    registry, places = open_runs(), [Path(folder).resolve() for folder in folders]
    if forget:
        if to is not None or not places:
            raise ConfigError(
                "forget: needs the folders to give up, and cannot go with `to`: mnist-exp sync "
                "FOLDER --forget"
            )
        return waiting.forget(registry, places), {}
    if to is not None:
        places = waiting.redirect(registry, places, to)
        if not places:
            return 0, {}
    return waiting.deliver(registry, places)


def open_store(overrides: Sequence[str] = (), *, data: bool = False) -> Store:
    """Return the store of `store_uri`, once what waited for it has been uploaded.

    Raises:
        ConfigError: As `store_uri` does, and where there is no such store yet.
    """
    uri = store_uri(overrides, data=data)
    waiting.deliver_to(open_runs(), uri)
    if not has_runs(uri):
        raise ConfigError(f"{uri}: there are no runs yet. To make one: mnist-exp train")
    return Store(uri)


def find_run(
    word: str, overrides: Sequence[str], *, sweep: bool = False, data: bool = False
) -> tuple[Store, StoredRun, str | None]:
    """Return a store, a run in it, and the folder that the run's data has moved to, if any.

    Args:
        word: The run, by `last`, its id, or the beginning of it.
        overrides: `tracking.uri=...`, the store.
        sweep: The run is the parent of a sweep.
        data: The overrides may have `dataset.root=...` as well, the folder of its data.

    Raises:
        ConfigError: There is no such run, or an override says something else.
    """
    store = open_store(overrides, data=data)
    return store, store.find(word, sweep=sweep), dataset_root(overrides)
