"""The results of a sweep's jobs, from their journals or from the store alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mnist_exp.config.names import short_names
from mnist_exp.formatting import Table
from mnist_exp.sweeps import report
from mnist_exp.sweeps.manifest import MANIFEST, Manifest, SweepJob
from mnist_exp.sweeps.report import Cell, JobResult
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import mark_killed
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState

JOB_CURVES = ("train/loss", "val/loss", "val/accuracy")


@dataclass(frozen=True)
class Report:
    """The results of a sweep's jobs, and the ranking of its cells."""

    jobs: list[JobResult]
    ranked: list[Cell]
    chosen: Cell | None
    failure: str = ""  # what went wrong, if anything
    run_id: str = ""  # of the parent run that the report was put onto again
    files: tuple[str, ...] = ()  # their names there

    @property
    def failed(self) -> list[JobResult]:
        """The jobs that were to run and did not reach their end."""
        return [job for job in self.jobs if job.status not in ("FINISHED", "INVALID")]

    def table(self) -> Table:
        """Return the leaderboard: a row a cell."""
        return report.leaderboard(self.ranked, self.chosen)

    def draw(self) -> dict[str, Any]:
        """Return heat maps of the swept numbers, and the curves of all jobs, by name."""
        from mnist_exp.figures.curves import sweep_curves
        from mnist_exp.figures.matrices import heat_map

        short = short_names({key for job in self.jobs for key in job.values})
        figures = {}
        for data in report.heat_maps(self.ranked, self.chosen):
            over = ", ".join(short[key] for key in data.over)
            x, y = short[data.x_key], short[data.y_key]
            figures[f"heat_map_{x}_{y}"] = heat_map(
                (data.x_key, data.x_values),
                (data.y_key, data.y_values),
                data.mean,
                data.std,
                data.chosen,
                "validation accuracy",
                f"each the best over {over}" if over else "",
            )
        curves = {}
        for cell in self.ranked:
            if histories := [job.history for job in cell.jobs if job.history]:
                curves[cell.label] = histories
        if curves:
            label = None if self.chosen is None else self.chosen.label
            figures["learning_curves"] = sweep_curves(curves, label, "learning curves")
        return figures


def summarise(jobs: Sequence[JobResult]) -> Report:
    """Return the cells of a sweep, ranked, and which of them is chosen."""
    ranked = report.cells(jobs)
    return Report(list(jobs), ranked, report.choose(ranked))


def read_result(job: SweepJob) -> JobResult | None:
    """Return what the record in a job's folder says; None where there is no record."""
    history = RunHistory.of(job.folder)
    if not history.key:
        return None
    curves = {key: history.history(key) for key in JOB_CURVES}
    best = max((value for _, value in curves["val/accuracy"]), default=None)
    so_far = {} if best is None else {"best/val_accuracy": best}  # of one that was stopped
    status, run_id = history.status or "RUNNING", UploadState.of(job.folder).run_id or history.key
    metrics = so_far | history.newest()
    return JobResult(job.number, job.values, status, history.reason, run_id, metrics, curves)


def unrecorded(job: SweepJob, status: str, reason: str) -> JobResult:
    """Return the result of a job whose record does not say what has become of it."""
    return JobResult(job.number, job.values, status, reason)


def result_of(
    job: SweepJob, status: str = "FAILED", reason: str = "its record has no end"
) -> JobResult:
    """Return the result of a job that is over: its record's or, if that has no end, this one."""
    result = read_result(job)
    if result is None or result.status == "RUNNING":
        return unrecorded(job, status, reason)
    return result


def mark_job_killed(job: SweepJob, reason: str) -> JobResult:
    """End the record of a job whose process died, unless it had ended, and return its result."""
    history = RunHistory.of(job.folder)
    is_open = history.key and not history.status
    if is_open and mark_killed(job.folder, history.owner, reason):
        with (job.folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(reason + "\n")
    return result_of(job, "KILLED", reason)


def load_from_journals(manifest: Manifest, results: Mapping[int, JobResult]) -> list[JobResult]:
    """Return the results of all jobs of a sweep; `results` are those of jobs without a record."""
    recorded = ((job.number, read_result(job)) for job in manifest.valid)
    found = {number: result for number, result in recorded if result is not None}
    return complete(manifest, {**results, **found})


def load_from_store(store: Store, parent: str) -> list[JobResult]:
    """Return the results of all jobs of a sweep, from the store alone; `parent` is its run's id."""
    with TemporaryDirectory() as temporary:
        store.fetch(parent, MANIFEST, Path(temporary))
        manifest = Manifest.load(Path(temporary))
    runs, results = store.children(parent), {}
    for job in manifest.valid:
        if (run := runs.get(job.number)) is not None:
            curves = {key: store.history(run.id, key) for key in JOB_CURVES}
            reason = run.tags.get("reason", "")
            results[job.number] = JobResult(
                job.number, job.values, run.status, reason, run.id, run.metrics, curves
            )
    return complete(manifest, results)


def complete(manifest: Manifest, results: Mapping[int, JobResult]) -> list[JobResult]:
    """Return the result of every job of a sweep, those included that have no run."""
    every = []
    for job in manifest.jobs:
        ended = manifest.ended.get(job.number, ("NOT RUN", ""))
        status, reason = ("INVALID", job.problem) if job.problem else ended
        every.append(results.get(job.number) or unrecorded(job, status, reason))
    return every
