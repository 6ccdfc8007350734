"""Which store and which data a command looks into, by the overrides that were typed."""

import logging
from collections.abc import Sequence

from mnist_exp.config import paths
from mnist_exp.config.compose import check_list, compose
from mnist_exp.config.schema import task_config
from mnist_exp.config.validate import validate
from mnist_exp.errors import ConfigError
from mnist_exp.tracking import address, upload
from mnist_exp.tracking.run_log import OpenRuns, open_runs_at
from mnist_exp.tracking.store import Store, has_runs
from mnist_exp.tracking.store_check import check_store

log = logging.getLogger(__name__)


def open_runs() -> OpenRuns:
    """Return the registry of the project's runs that are not both ended and uploaded."""
    return open_runs_at(paths.output_root())


def dataset_root(overrides: Sequence[str]) -> str | None:
    """Return the folder that a run's data has moved to, if an override names it."""
    roots = [word for word in overrides if word.startswith("dataset.root=")]
    return compose(roots).dataset.root if roots else None


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
                f"{override}: it would change nothing here, as the run is on record. What can be "
                f"said is tracking.uri=..., the store{more}"
            )
    typed_uri = validate(task_config(compose(overrides))).tracking.uri
    address.warn_if_environment_wins(typed_uri)
    uri = address.store_uri(typed_uri, paths.output_root())
    check_store(uri, required=required)
    return uri


def open_store(overrides: Sequence[str] = (), *, data: bool = False) -> Store:
    """Return the store of `store_uri`, once what waited for it has been uploaded.

    Raises:
        ConfigError: As `store_uri` does, and where there is no such store yet.
    """
    uri = store_uri(overrides, data=data)
    _, problems = upload.sync(open_runs(), uri)
    for folder, reason in problems.items():
        log.warning("%s: not in MLflow yet: %s", folder, reason)
    if not has_runs(uri):
        raise ConfigError(f"{uri}: there are no runs yet. To make one: mnist-exp train")
    return Store(uri)
