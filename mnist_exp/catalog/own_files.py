"""Which files are the project's own, so that they may be removed, and how large they are."""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from mnist_exp.config import paths
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import RunHistory

REMOVED = ".removed"  # in outputs/: what a removal has moved away, until all of it is gone
EVALUATIONS = "evaluations"  # in outputs/: the figures of `evaluate`, a folder a run
NO_RUNS_IN = (".open", REMOVED, EVALUATIONS)


def is_id(text: str) -> bool:
    """Return whether a text is an id of a run or a key of a record, which a path may be made of."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def outputs() -> Path:
    """Return the real path of the folder that all output goes to."""
    return Path(os.path.realpath(paths.output_root() / "outputs"))


def own_folder(folder: Path, keys: Collection[str]) -> tuple[Path | None, str]:
    """Return the real path of a run's folder if it may be removed; else None, and why not.

    It has to be below outputs/, and to hold the record of the run and of no other one but those of
    its jobs. There is no reason where there is no such folder.

    Args:
        folder: The folder, as a record names it.
        keys: The key of the run, and then those of its jobs.
    """
    if not os.path.lexists(folder):
        return None, ""
    real, top = Path(os.path.realpath(folder)), outputs()
    if folder.is_symlink():
        return None, "it is a symbolic link"
    if top not in real.parents:
        return None, f"it is outside of {top}"
    if real.relative_to(top).parts[0] in NO_RUNS_IN:
        return None, "it is no folder for runs"
    own_key = next(iter(keys), "")
    try:
        if not own_key or RunHistory.of(real).key != own_key:
            return None, "it does not hold the record of this run"
        for path in journals(real):
            history = RunHistory.of(path.parent)
            if not is_id(history.key):
                return None, f"the key of the record in {path.parent} is damaged: {history.key!r}"
            if history.key not in keys and history.parent not in (str(folder), str(real)):
                return None, f"it holds the record of another run, in {path.parent}"
    except OSError as error:
        return None, f"it cannot be read ({error.strerror or error})"
    return real, ""


def journals(folder: Path) -> Iterator[Path]:
    """Yield the journals in a folder and below. Raises OSError where that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=fail):  # which follows no links
        if journal.NAME in names:
            yield Path(place, journal.NAME)


def size_of(places: Iterable[Path]) -> int:
    """Return the bytes of files, and of the files in folders, as far as they can be read."""
    total = 0
    for place in places:
        if place.is_file() and not place.is_symlink():
            total += place.stat().st_size
        for folder, _, names in os.walk(place):
            total += sum(os.lstat(Path(folder, name)).st_size for name in names)
    return total


def evaluation_of(run_id: str) -> Path | None:
    """Return the folder of what `evaluate` has kept and drawn of a run, if there is one.

    Runs whose ids begin alike share a folder, which is that of the run evaluated last.
    """
    if not is_id(run_id):
        return None
    top = outputs() / EVALUATIONS
    folder = top / run_id[:8]
    if not folder.is_dir() or folder.is_symlink() or top.is_symlink():
        return None
    kept = KeptPredictions.read(folder)
    return folder if kept is None or kept.run_id == run_id else None
