"""What is of no more use: deleted runs, folders whose run is gone, leftovers, old checkpoints."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from mnist_exp.catalog.own_files import (
    EVALUATIONS,
    NO_RUNS_IN,
    REMOVED,
    is_id,
    journals,
    outputs,
    size_of,
)
from mnist_exp.catalog.records import Record, of_store
from mnist_exp.catalog.removal import Removal, remove_all
from mnist_exp.catalog.remove import (
    has_been_moved,
    jobs_of,
    left_of,
    removal_of,
    size_text,
)
from mnist_exp.errors import ConfigError, first_line
from mnist_exp.run import kept_predictions
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.tracking import deletion, journal
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState

STACKS = ".stacks"  # in a sweep's folder: the checkpoints of its stacks
_CHECKPOINT = re.compile(r"state-\d{9,}\.pt(\.sha256)?")
_PART = re.compile(r".+\..+-\d+-\d+\.part")  # as system.files.write names them
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_AN_HOUR = 3600  # seconds
_SHOWN = 10  # of a kind


@dataclass
class GarbagePlan:
    """The things that can be cleared, and those that are kept, each with the reason."""

    store: Store | None
    open_runs: OpenRuns
    typed: Sequence[str] = ()  # the overrides with which the store was found
    removals: dict[str, Removal] = field(default_factory=dict)  # by the id or the key
    files: dict[str, list[Path]] = field(default_factory=dict)  # by what they are
    checkpoints: list[tuple[Path, list[Path]]] = field(default_factory=list)  # by the run's folder
    kept: dict[str, list[str]] = field(default_factory=dict)  # by the reason

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to clear."""
        return not (self.removals or any(self.files.values()) or self.checkpoints)

    def lines(self) -> list[str]:
        """Return what would be cleared, what would be kept, and how much it is in all."""
        groups = {"runs and folders": [r.title for r in self.removals.values()]}
        groups |= {kind: [str(path) for path in paths] for kind, paths in self.files.items()}
        if self.checkpoints:
            groups["checkpoints of finished runs"] = [str(folder) for folder, _ in self.checkpoints]
        lines = []
        for kind, texts in groups.items():
            if texts:
                lines += [f"{kind}: {len(texts):,}", *(f"  {text}" for text in texts[:_SHOWN])]
            if len(texts) > _SHOWN:
                lines.append(f"  and {len(texts) - _SHOWN:,} more")
        for reason, names in self.kept.items():
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            lines.append(f"kept, {reason}: {', '.join(names[:3])}{more}")
        lines.append(f"in all: {size_text(self.bytes)}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return what would be cleared and kept as plain values: docs/tidying.md has the names."""
        places = [path for paths in self.files.values() for path in paths]
        checkpoints = [path for _, paths in self.checkpoints for path in paths]
        return {
            "removals": [removal.as_json() for removal in self.removals.values()],
            "files": [str(path) for path in places],
            "checkpoints": [str(path) for path in checkpoints],
            "kept": self.kept,
            "bytes": self.bytes,
        }

    @property
    def bytes(self) -> int:
        """The size of all that can be cleared."""
        places = [path for paths in self.files.values() for path in paths]
        places += [path for _, paths in self.checkpoints for path in paths]
        return size_of(places) + sum(removal.bytes for removal in self.removals.values())

    def keep(self, reason: str, name: object) -> None:
        """Note that something is kept, and why."""
        self.kept.setdefault(reason, []).append(str(name))

    def carry_out(self) -> None:
        """Clear all of it. Raise RunFailed or OSError where that fails; it can be typed again."""
        to_go_on = shlex.join(["mnist-exp", "gc", *self.typed])  # `rm` finds no deleted runs
        remove_all(list(self.removals.values()), self.store, self.open_runs, lambda _: to_go_on)
        for folder, paths in self.checkpoints:
            if RunHistory.of(folder).status == "FINISHED":  # a sweep may be gone on with meanwhile
                _remove(paths)
        for paths in self.files.values():
            _remove(paths)
        for day in _empty_days():
            day.rmdir()


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def plan(
    records: Sequence[Record],
    store: Store | None,
    open_runs: OpenRuns,
    *,
    checkpoints: bool,
    typed: Sequence[str] = (),
) -> GarbagePlan:
    """Return what can be cleared.

    Args:
        records: All records of the store, and those that wait for it.
        store: The store, if there is one.
        open_runs: The registry of the runs that their stores do not have whole: nothing of them
            is touched.
        checkpoints: Also the numbered checkpoints of finished runs, which a run is resumed from.
        typed: The overrides that name the store.

    Raises:
        ConfigError: A folder in outputs/ cannot be read.
    """
    found = _Search(records, store, open_runs).plan(checkpoints)
    return replace(found, typed=typed)


class _Search:
    """A search for what can be cleared."""

    def __init__(self, records: Sequence[Record], store: Store | None, open_runs: OpenRuns) -> None:
        entries = open_runs.entries()
        self.records, self.store = records, store
        self.open_keys = {run.key for run in entries}
        self.open_folders = {run.folder for run in entries}
        self.found = GarbagePlan(store, open_runs)
        self.top = outputs()
        # the runs of stores and when those were made, by their addresses; None: unknown
        self._ids: dict[str, tuple[set[str], int | None] | None] = {}
        self._gone_ids: set[str] = set()  # of the runs whose folders go

    def plan(self, checkpoints: bool) -> GarbagePlan:
        self._find_interrupted()
        self._find_deleted()
        try:
            folders = [path.parent for path in self._journals()]
        except OSError as error:
            raise ConfigError(f"{self.top}: cannot be read, {error}") from error
        self._find_orphans(folders)
        if checkpoints:
            self._find_checkpoints(folders)
        self._find_evaluations()
        parts = [path for path in self._old_parts() if not self._is_open(path.parent)]
        self.found.files["files that were never completed"] = parts
        self.found.files["empty folders of days"] = list(_empty_days())
        return self.found

    def _journals(self) -> Iterator[Path]:
        """Yield the journals of all runs in outputs/."""
        for entry in sorted(self.top.iterdir()) if self.top.is_dir() else []:
            if entry.is_dir() and not entry.is_symlink() and entry.name not in NO_RUNS_IN:
                yield from journals(entry)

    def _is_open(self, folder: Path) -> bool:
        """Return whether a folder is one of a run or a sweep that has not ended, or waits."""
        return any(place in self.open_folders for place in (folder, *folder.parents))

    def _ids_in(self, uri: str) -> tuple[set[str], int | None] | None:
        """Return the ids of a store's runs, and when it was made; None if it cannot be opened."""
        if uri not in self._ids:
            try:
                self._ids[uri] = deletion.ids_in(uri)
            except ConfigError as error:
                self._ids[uri] = None
                self.found.keep("as this store cannot be opened", first_line(error))
        return self._ids[uri]

    def _find_interrupted(self) -> None:
        """Find what `rm` has moved away, and did not come to the end of."""
        place = self.top / REMOVED
        names = sorted(os.listdir(place)) if place.is_dir() and not place.is_symlink() else []
        by_id = {record.id: record for record in self.records}
        for name in names:
            if not (place / name).is_dir() or (name in by_id and not has_been_moved(name)):
                continue  # it is none of ours, or it died before anything had been moved
            if name in by_id:
                jobs = jobs_of(by_id[name], self.records)
                if (removal := self._removal_of(by_id[name], jobs)) is not None:
                    self.found.removals[name] = removal
                continue
            uris = {RunHistory.of(path.parent).uri for path in journals(place / name)} - {""}
            ids = {uri: self._ids_in(uri) for uri in sorted(uris)}
            if all(known is not None and name not in known[0] for known in ids.values()):
                self.found.removals[name] = left_of(name)
            else:
                how = " or ".join(f"mnist-exp rm {name[:8]} tracking.uri={uri}" for uri in ids)
                self.found.keep("as it is in another store. To go on", how)

    def _removal_of(self, record: Record, jobs: Sequence[Record]) -> Removal | None:
        """Return the removal of a run, or note why that has to be kept, and return None."""
        try:
            return removal_of(record, jobs, self.store)
        except ConfigError as error:
            self.found.keep("as its record is damaged", first_line(error))
            return None

    def _find_deleted(self) -> None:
        """Find the runs that MLflow has marked as deleted."""
        if self.store is None:
            return
        try:
            deleted = {run.id: of_store(run) for run in self.store.deleted() if run.key}
        except ConfigError as error:
            self.found.keep("as this store cannot be opened", first_line(error))
            return
        keys = {record.key for record in self.records}
        parents = {record.parent for record in self.records if record.parent}
        open_sweeps = {record.id for record in self.records if record.open_run is not None}
        for record in deleted.values():
            jobs = jobs_of(record, list(deleted.values()))
            of_sweep = {record.key, *(job.key for job in jobs)}
            name = f"{record.kind} {record.id[:8]}"
            if record.parent in deleted or record.id in self.found.removals:
                continue  # it goes with its sweep
            if of_sweep & (self.open_keys | keys) or record.parent in open_sweeps:
                self.found.keep("deleted in MLflow, but not at its end yet", name)
            elif record.id in parents:
                self.found.keep("deleted in MLflow, but not all of its jobs are", name)
            else:
                self._add_deleted(record, jobs)

    def _add_deleted(self, record: Record, jobs: Sequence[Record]) -> None:
        removal = self._removal_of(record, jobs)
        assert self.store is not None
        if removal is None:
            return
        if not (deletion.can_delete_for_good(self.store) or removal.folders or removal.files):
            return  # the owner of the server has to free the rest
        stored = [one.stored for one in (*jobs, record) if one.stored is not None]
        if names := deletion.registered_models(self.store, stored):
            self.found.keep("as its model is in MLflow's registry", ", ".join(names))
            return
        title = f"{removal.title}, deleted in MLflow"
        self.found.removals[record.id] = replace(removal, title=title, stored=stored)

    def _find_orphans(self, folders: Sequence[Path]) -> None:
        """Find the folders whose runs were in a store once, as a whole, and are not any more."""
        going = [folder for r in self.found.removals.values() for folder in r.folders]
        gone: dict[Path, RunHistory] = {}
        for folder in folders:
            if any(place in going for place in (folder, *folder.parents)) or self._is_open(folder):
                continue
            if (history := self._gone(folder)) is not None:
                gone[folder] = history
        for folder, history in gone.items():
            if any(place in gone for place in folder.parents):
                continue  # it goes with its sweep
            inside = {path.parent for path in journals(folder)}
            if inside <= gone.keys():
                title = f"{folder}, whose run {history.name} is no longer in {history.uri}"
                self.found.removals[history.key] = Removal(
                    history.key, title, None, [], [folder], [], [], history.uri
                )
                self._gone_ids |= {UploadState.of(place).run_id for place in inside}
            else:
                self.found.keep("as it holds records of other runs", folder)

    def _gone(self, folder: Path) -> RunHistory | None:
        """Return the history of a run that its store had as a whole, and has not any more."""
        state = UploadState.of(folder)
        is_whole = state.run_id and state.ended and state.offset >= journal.size(folder)
        if not is_whole:
            self.found.keep("as MLflow never had the whole record", folder)
            return None
        known = self._ids_in(state.uri)
        if known is None or state.run_id in known[0]:
            return None
        history = RunHistory.of(folder)
        if not is_id(history.key) or history.key in self.open_keys or history.uri != state.uri:
            self.found.keep("as MLflow never had the whole record", folder)
            return None
        if (reason := _was_made_anew(state.uri, known[1], history.start_time)) is not None:
            self.found.keep(reason, folder)
            return None
        return history

    def _find_checkpoints(self, folders: Sequence[Path]) -> None:
        """Find the checkpoints that finished runs and sweeps could be resumed from."""
        going = [folder for r in self.found.removals.values() for folder in r.folders]
        for folder in folders:
            if any(place in going for place in (folder, *folder.parents)) or self._is_open(folder):
                continue
            paths = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)]
            stacks = folder / STACKS
            if stacks.is_dir() and not stacks.is_symlink():
                paths.append(stacks)
            if paths and _is_finished(folder):
                self.found.checkpoints.append((folder, sorted(paths)))

    def _find_evaluations(self) -> None:
        """Find what `evaluate` has kept and drawn of runs that are in their store no more."""
        place = self.top / EVALUATIONS
        if not place.is_dir() or place.is_symlink():
            return
        self._gone_ids |= self.found.removals.keys()
        self.found.files["figures of runs that are gone"] = [
            folder
            for folder in sorted(place.iterdir())
            if folder.is_dir() and not folder.is_symlink() and self._is_of_no_run(folder)
        ]

    def _is_of_no_run(self, folder: Path) -> bool:
        """Return whether the run that was evaluated into a folder is gone from its store."""
        kept = KeptPredictions.read(folder)
        if kept is None or not is_id(kept.run_id) or kept.run_id[:8] != folder.name:
            return False
        if kept.run_id in self._gone_ids:
            return True
        if any(kept.run_id in (record.id, record.key) for record in self.records):
            return False
        if not kept.store or (known := self._ids_in(kept.store)) is None or kept.run_id in known[0]:
            return False
        written = int((folder / kept_predictions.NAME).stat().st_mtime * 1000)
        if (reason := _was_made_anew(kept.store, known[1], written)) is not None:
            self.found.keep(reason, folder)
            return False
        return True

    def _old_parts(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.top):
            for name in filter(_PART.fullmatch, names):
                if time.time() - os.lstat(path := Path(folder, name)).st_mtime > _AN_HOUR:
                    yield path


def _was_made_anew(uri: str, made: int | None, time_on_record: int) -> str | None:
    """Return why what a store has not got any more may be wanted all the same, or None.

    Args:
        uri: The address of the store.
        made: When it was made, in ms since 1970, if that is known.
        time_on_record: When it had the run, likewise.
    """
    if made is None:
        return f"as {uri} does not tell whether it was made anew since"
    return f"as {uri} was made anew since, without it" if time_on_record < made else None


def _is_finished(folder: Path) -> bool:
    """Return whether a run has reached its end, and, of a job, its sweep as well."""
    history = RunHistory.of(folder)
    if history.status != "FINISHED":
        return False
    return not history.parent or RunHistory.of(Path(history.parent)).status == "FINISHED"


def _empty_days() -> Iterator[Path]:
    """Yield the folders of days that hold nothing; into that of today, a run may come now."""
    for parent in (outputs(), outputs() / "sweeps"):
        for folder in sorted(parent.iterdir()) if parent.is_dir() else []:
            is_day = _DAY.fullmatch(folder.name) and folder.name < date.today().isoformat()
            is_own = is_day and folder.is_dir() and not folder.is_symlink()
            if is_own and not any(folder.iterdir()):
                yield folder
