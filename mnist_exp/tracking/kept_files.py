"""The files of a run that its own folder has, by the names that they have among its artifacts.

They are of use where the artifacts of a store have moved, or cannot be reached.
"""

import posixpath
import shutil
from pathlib import Path

from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import RunHistory

DIFF = "uncommitted.diff"  # the artifact with the changes of the code that no commit has


def copy(folder: Path, key: str, artifact: str, to: Path) -> Path | None:
    """Copy an artifact, a file or a folder of files, from a run's folder, and return the copy.

    Return None unless all of it is there, and is what the run of this key has recorded. Raises
    OSError where it cannot be read, or the copy not be written.

    Args:
        folder: The output folder of the run.
        key: The key of the run's record.
        artifact: The name of the artifact.
        to: The folder for the copy.
    """
    recorded = recorded_files(folder, key)
    found = [name for name in recorded if name == artifact or name.startswith(f"{artifact}/")]
    for name in found:
        path, digest = recorded[name]
        if not path.is_file() or digest not in ("", files.sha256(path)):
            return None
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
    return to / artifact if found else None


def recorded_files(folder: Path, key: str) -> dict[str, tuple[Path, str]]:
    """Return file and digest of a run's artifacts by their names; "" where there is no digest."""
    try:
        if not key or RunHistory.of(folder).key != key:
            return {}
        entries, _ = journal.read(folder)
    except OSError:
        return {}
    return {
        posixpath.join(entry.fields["to"], Path(entry.fields["path"]).name): (
            folder / entry.fields["path"],
            entry.fields.get("sha256", ""),
        )
        for entry in entries
        if entry.kind == "artifact"
    }
