"""The end of a sweep: its chosen cell is tested, and its report recorded."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mnist_exp.config import paths
from mnist_exp.config.names import short_names
from mnist_exp.config.schema import Config
from mnist_exp.errors import reason_of
from mnist_exp.figures import curves, style
from mnist_exp.formatting import Table
from mnist_exp.run import recorder
from mnist_exp.run.console import Reporter
from mnist_exp.run.provenance import SWEPT, described, process_tags
from mnist_exp.run.stored_config import load_config
from mnist_exp.sweeps.launcher import Results, SweepSetup, load_cached
from mnist_exp.sweeps.manifest import MANIFEST, Manifest, swept_values
from mnist_exp.sweeps.report import Cell
from mnist_exp.sweeps.report_files import BEST, best_recipe_of, show, write
from mnist_exp.sweeps.results import (
    Report,
    load_from_journals,
    mark_job_killed,
    summarise,
)
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.mlflow_internals import RUN_COLOUR
from mnist_exp.tracking.notes import DESCRIPTION, NOTE, described_with
from mnist_exp.tracking.run_log import RunWriter, add_tags, open_runs_at
from mnist_exp.tracking.upload import UploadState
from mnist_exp.tracking.uploader import Uploader

DESCRIBED = 20  # cells of the leaderboard that the parent run's description has room for
FLUSH_SECONDS = 10.0  # that the report waits for MLflow, which may still be importing


@dataclass(frozen=True)
class OpenSweep:
    """A sweep whose jobs run."""

    setup: SweepSetup
    manifest: Manifest
    parent: RunWriter  # the record of the run that the jobs' runs are nested under
    uploader: Uploader
    reporter: Reporter
    results: Results = field(default_factory=dict)  # what the launcher says of the jobs


def open_parent(setup: SweepSetup, manifest: Manifest, config: Config) -> RunWriter:
    """Begin the record of a sweep's parent run, or go on with it.

    Args:
        setup: What the jobs have in common.
        manifest: The jobs.
        config: The config of one of them.
    """
    swept = swept_values(manifest.jobs)
    keys = " x ".join(short_names(list(swept)).values())
    tags = {
        **process_tags(),
        "sweep": "true",
        "jobs": str(len(manifest.valid)),
        "launcher": manifest.launcher,
        "output_dir": str(setup.folder),
        "dataset": config.dataset.name,
    }
    parent = RunWriter.begin(
        setup.folder,
        open_runs_at(paths.output_root()),
        name=f"sweep {keys} ({len(manifest.jobs)} jobs)",
        uri=setup.store_uri,
        experiment=config.tracking.experiment,
        tags=tags,
    )
    parent.params({f"{SWEPT}{key}": ",".join(values) for key, values in swept.items()})
    parent.artifact(setup.folder / MANIFEST)
    return parent


def finish_sweep(sweep: OpenSweep, ended: str = "") -> Report:
    """Test the chosen cell, write the report, and show it.

    If the sweep has `ended` before its time, for that reason, nothing is tested.
    """
    sweep.reporter.stop()
    manifest, failures = sweep.manifest, []
    if ended:
        for job in manifest.valid:
            mark_job_killed(job, ended)
        manifest = replace(manifest, ended={j.number: ("NOT RUN", ended) for j in manifest.valid})
    else:
        sweep.reporter.announce("testing the best, drawing the report, uploading ...")
        chosen = summarise(load_from_journals(manifest, sweep.results)).chosen
        if chosen is not None and sweep.setup.settings.test == "chosen":
            failures = _test_cell(chosen, manifest)
        sweep.uploader.flush(FLUSH_SECONDS)  # so that the report has MLflow's names of the runs
    summary = summarise(load_from_journals(manifest, sweep.results))
    if summary.failed:
        failures.insert(0, f"{len(summary.failed)} of {len(summary.jobs)} jobs did not finish")
    _write_to_parent(sweep.parent, manifest, summary)
    show(summary, sweep.reporter)
    if not ended and len(summary.ranked) > 1:
        _colour_runs(manifest, summary)
    return replace(summary, failure="; ".join(failures))


def _colour_runs(manifest: Manifest, summary: Report) -> None:
    """Give each run the colour that its cell has in the report: MLflow's charts draw it so."""
    label = None if summary.chosen is None else summary.chosen.label
    colours = curves.cell_colours([cell.label for cell in summary.ranked], label)
    for cell in summary.ranked:
        for job in cell.jobs:
            if job.run_id:
                _colour_run(manifest.jobs[job.number].folder, colours.get(cell.label, curves.GREY))


def _colour_run(folder: Path, colour: str) -> None:
    def change(tags: Mapping[str, str]) -> Mapping[str, str]:
        return {} if tags.get(RUN_COLOUR) == colour else {RUN_COLOUR: colour}

    with contextlib.suppress(OSError):  # the sweep has come to its end without it
        add_tags(folder, open_runs_at(paths.output_root()), change)


def _test_cell(chosen: Cell, manifest: Manifest) -> list[str]:
    """Test the runs of the chosen cell, and return what went wrong."""
    failures = []
    for job in chosen.finished:
        if job.metric("test/accuracy") is not None:
            continue  # by an earlier try: the test set is read once
        try:
            recorder.record_deferred_test(manifest.jobs[job.number].folder, load_cached)
        except Exception as error:  # the report is made all the same
            failures.append(f"the test of {chosen.label} failed: {reason_of(error)}")
    return failures


def _write_to_parent(parent: RunWriter, manifest: Manifest, summary: Report) -> None:
    """Write the report to the sweep's folder and to its parent run."""
    folder, best_recipe = parent.folder, ""
    # what has no run is known from here alone
    ended = {job.number: (job.status, job.reason) for job in summary.jobs}
    replace(manifest, ended=ended).save(folder)
    parent.artifact(folder / MANIFEST)
    _record_numbers(parent, summary)
    if summary.chosen is not None:
        best = manifest.jobs[summary.chosen.finished[0].number].folder
        config = load_config(best / "config.yaml")
        choices = json.loads(RunHistory.of(best).tags["choices"])
        name = UploadState.of(folder).run_id or folder.name
        best_recipe = best_recipe_of(summary.chosen, name, config, choices)
    figures = summary.draw()
    for path in write(summary, figures, best_recipe, folder):
        parent.artifact(path)
    for name, figure in figures.items():
        parent.image(f"sweep/{name}", style.pixels(figure), 0)


def outcome_of(folder: Path) -> dict[str, str | None]:
    """Return the choice of a sweep that has ended: its cell, and the recipe of that."""
    chosen = RunHistory.of(folder).tags.get("chosen")
    best = folder / BEST
    return {
        "chosen": chosen,
        "best_recipe": str(best) if chosen is not None and best.exists() else None,
    }


def _record_numbers(parent: RunWriter, summary: Report) -> None:
    """Record the numbers of the choice, and how many jobs there are of each kind."""
    finished = sum(job.status == "FINISHED" for job in summary.jobs)
    values: dict[str, float] = {
        "jobs/finished": finished,
        "jobs/not_finished": len(summary.jobs) - finished,
    }
    if (chosen := summary.chosen) is not None:
        val, test = chosen.val_accuracy, chosen.test_accuracy
        for key, accuracy in (("best/val_accuracy", val), ("test/accuracy", test)):
            if accuracy is not None:
                values[key] = round(accuracy.mean, 10)  # 0.918, and not 0.9179999999999999
                values[f"{key}_n"] = accuracy.n
                if accuracy.std is not None:
                    values[f"{key}_std"] = accuracy.std
        header, rows = summary.table()
        table = Table(header, rows[:DESCRIBED]).markdown()
        word = f"experiments={parent.folder / BEST}"
        description = described(f"{table}\nTo train the best again:", word)[DESCRIPTION]
        add_tags(
            parent.folder,
            open_runs_at(paths.output_root()),
            lambda tags: {
                "chosen": chosen.label,
                DESCRIPTION: described_with(tags.get(NOTE, ""), description),
            },
        )
    # a sweep that is resumed comes to another end: its number is the step
    tries = RunHistory.of(parent.folder).history("jobs/finished")
    parent.metrics(values, len(tries))
