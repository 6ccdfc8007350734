"""The cells of a sweep on record, and what a person names one by: SWEEP, SWEEP:3, SWEEP:lr=0.1."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mnist_exp.catalog.records import Record
from mnist_exp.config.names import short_names
from mnist_exp.errors import ConfigError, did_you_mean
from mnist_exp.sweeps import report, results
from mnist_exp.sweeps.manifest import MANIFEST, Manifest
from mnist_exp.sweeps.report import Cell, JobResult
from mnist_exp.tracking.store import Store

SHOWN = 20  # cells that a message lists


@dataclass(frozen=True)
class SweepCell:
    """One cell of a sweep, with the records of its jobs."""

    sweep: Record
    cell: Cell
    rank: int  # in the leaderboard, from 1
    is_chosen: bool
    jobs: Sequence[Record]  # that have a record
    ranking: tuple[str, ...]  # the labels of all cells of the sweep, the best first
    chosen: str | None  # the label of the chosen one

    def by_seed(self, metric: str) -> dict[str, float]:
        """Return a metric of the jobs that finished, by their seed, where it is finite."""
        seeds = {record.id: record.params.get("seed", "") for record in self.jobs}
        values = {
            seeds[job.run_id]: job.metric(metric)
            for job in self.cell.finished
            if job.run_id in seeds  # a run may have been deleted since
        }
        return {seed: value for seed, value in values.items() if seed and value is not None}


def find_cell(sweep: Record, word: str) -> SweepCell:
    """Return a cell of a sweep: the chosen one for "", or by its rank or its values.

    Raises:
        ConfigError: There is no such cell, several have the values, or none was chosen.
    """
    ranked = report.cells(_results(sweep))
    if not ranked:
        raise ConfigError(f"{sweep.id[:8]}: the sweep has no job on record yet")
    chosen = _chosen(sweep, ranked)
    if not word:
        if chosen is None:
            raise ConfigError(
                f"{sweep.id[:8]}: validation has chosen no cell of this sweep. Name one, as in "
                f"{sweep.id[:8]}:1. Its cells are{_listed(ranked)}"
            )
        cell = chosen
    elif word.isdecimal():
        if not 1 <= int(word) <= len(ranked):
            raise ConfigError(f"{sweep.id[:8]}:{word}: its ranks are 1 to {len(ranked)}")
        cell = ranked[int(word) - 1]
    else:
        cell = _with_values(sweep, ranked, word)
    records = {record.id: record for record in sweep.jobs}
    return SweepCell(
        sweep=sweep,
        cell=cell,
        rank=1 + ranked.index(cell),
        is_chosen=cell == chosen,
        jobs=[records[job.run_id] for job in cell.jobs if job.run_id in records],
        ranking=tuple(each.label for each in ranked),
        chosen=None if chosen is None else chosen.label,
    )


def _with_values(sweep: Record, ranked: Sequence[Cell], word: str) -> Cell:
    """Return the one cell that has the values of a word: "lr=0.1,batch_size=32"."""
    typed = f"{sweep.id[:8]}:{word}"
    keys = list(dict.fromkeys(key for cell in ranked for key in cell.values))
    short = short_names(keys)
    by_name = {name: key for key in keys for name in (short[key], key)}
    wanted = {}
    for part in re.split(r"[,\s]+(?![^\[({]*[\])}])", word.strip()):
        name, equals, value = part.partition("=")
        if name in by_name and (not equals or by_name[name] in wanted):
            problem = "is named twice" if equals else "needs a value, as in 0.1"
            raise ConfigError(f"{typed}: {name} {problem}. Its cells are{_listed(ranked)}")
        if not equals or name not in by_name:
            allowed = ", ".join(short.values()) or "nothing but seeds"
            raise ConfigError(
                f"{typed}: {part} names no cell. {did_you_mean(name, by_name)}A cell is named by "
                f"its rank or by values of what was swept ({allowed}):{_listed(ranked)}"
            )
        wanted[by_name[name]] = value
    matching = [
        cell
        for cell in ranked
        if all(_is_same(cell.values.get(key), value) for key, value in wanted.items())
    ]
    if len(matching) != 1:
        number = "no cell has" if not matching else f"{len(matching)} cells have"
        shown = _listed(ranked, matching)
        raise ConfigError(f"{typed}: {number} these values. Name one by its rank or all:{shown}")
    return matching[0]


def _is_same(value: str | None, typed: str) -> bool:
    if value is None or value == typed:
        return value == typed
    try:
        return float(value) == float(typed)
    except ValueError:
        return False


def _listed(ranked: Sequence[Cell], only: Sequence[Cell] = ()) -> str:
    """Return the ranks and labels of cells, a line each, for a message."""
    lines = [
        f"\n  {rank}  {cell.label}"
        for rank, cell in enumerate(ranked, start=1)
        if not only or cell in only
    ]
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "".join(lines[:SHOWN]) + more


def _chosen(sweep: Record, ranked: Sequence[Cell]) -> Cell | None:
    """Return the cell that the sweep has chosen at its end, or, before that, would choose."""
    label = sweep.tags.get("chosen")
    named = [cell for cell in ranked if cell.label == label]
    return named[0] if named else report.choose(ranked)


def _results(sweep: Record) -> list[JobResult]:
    """Return the results of a sweep's jobs, also of those without a run, where its list is here."""
    found = {
        job.job_number: JobResult(
            job.job_number, _swept(job), job.status, job.reason, job.id, job.metrics
        )
        for job in sweep.jobs
    }
    manifest = _manifest(sweep)
    return list(found.values()) if manifest is None else results.complete(manifest, found)


def _swept(job: Record) -> Mapping[str, str]:
    try:
        values = json.loads(job.tags.get("swept", ""))
        return {str(key): str(value) for key, value in values.items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"run {job.id}: its tag swept, which tells the cell that it belongs to, is damaged or "
            f"missing"
        ) from error


def _manifest(sweep: Record) -> Manifest | None:
    """Return the list of a sweep's jobs; None where it can be had neither here nor in the store."""
    try:
        if sweep.folder is not None and (sweep.folder / MANIFEST).is_file():
            return Manifest.load(sweep.folder)
        if sweep.stored is None or len(sweep.jobs) >= sweep.jobs_asked:
            return None  # all of them are on record
        with TemporaryDirectory() as temporary:
            Store(sweep.stored.store_uri).fetch(sweep.id, MANIFEST, Path(temporary))
            return Manifest.load(Path(temporary))
    except ConfigError:
        return None
