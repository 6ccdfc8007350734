"""A sweep in the store: its parent run, what its jobs have come to, and the report on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mnist_exp import config as configs
from mnist_exp import plots, report, run
from mnist_exp.config import SweepConfig
from mnist_exp.console import Reporter
from mnist_exp.errors import ConfigError, reason_of
from mnist_exp.job import Job, Load
from mnist_exp.record import provenance
from mnist_exp.report import Cell, JobRecord
from mnist_exp.tracking import Store, Tracker, store_uri

CURVES = ("train/loss", "val/loss", "val/accuracy")
BEST = "best.yaml"  # the recipe of the chosen cell
MANIFEST = "sweep.json"  # the jobs, those included that have no run

Jobs = Sequence[Mapping[str, Any]]  # values: what was swept; problem: why it cannot be run, or ''


@dataclass(frozen=True)
class Outcome:
    """What a job has come to, as its launcher hands it back."""

    status: str  # FINISHED, FAILED, KILLED; NOT RUN
    reason: str = ""
    run_id: str = ""
    history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # of CURVES


@dataclass(frozen=True)
class Report:
    """What a sweep has come to."""

    jobs: list[JobRecord]
    ranked: list[Cell]
    chosen: Cell | None
    failure: str = ""  # what went wrong, if anything

    @property
    def failed(self) -> list[JobRecord]:
        """The jobs that were to run and did not reach their end."""
        return [job for job in self.jobs if job.status not in ("FINISHED", "INVALID")]


def open_parent(
    store: Store,
    experiment: str,
    first: Job,
    jobs: Jobs,
    folder: Path,
    launcher: str,
) -> str:
    """The id of the run that the jobs' runs are nested under."""
    swept: dict[str, list[str]] = {}
    for job in jobs:
        for key, value in job["values"].items():
            if value not in swept.setdefault(key, []):
                swept[key].append(value)
    tags = {
        **provenance(),
        "sweep": "true",
        "launcher": launcher,
        "output_dir": str(folder),
        "dataset": first.config.dataset.name,
    }
    run_id = store.start_run(
        experiment,
        f"sweep {' x '.join(report.short_names(list(swept)).values())} ({len(jobs)} jobs)",
        tags,
    )
    parent = Tracker(store, run_id)
    parent.params({f"sweep.{key}": ",".join(values) for key, values in swept.items()})
    parent.text(json.dumps({"jobs": jobs}, indent=1), MANIFEST)
    return run_id


def mark_killed(config: DictConfig, parent: str, reason: str) -> Outcome:
    """Ends the record of a job whose process died without a word, unless it had ended before."""
    folder = Path(config.hydra.runtime.output_dir)
    asked = configs.validate(configs.task_config(config))
    store = Store(store_uri(asked.tracking.uri, configs.output_root()))
    number = str(config.hydra.job.num)
    for child in store.children(parent):
        if child.data.tags["job"] == number:
            run_id, tags = child.info.run_id, child.data.tags
            if child.info.status != "RUNNING":
                return Outcome(child.info.status, tags.get("reason", ""), run_id)
            with (folder / "train.log").open("a", encoding="utf-8") as file:
                file.write(reason + "\n")
            tracker = Tracker(store, run_id)
            tracker.artifact(folder / "train.log")
            tracker.finish("KILLED", reason)
            return Outcome("KILLED", reason, run_id)
    return Outcome("KILLED", reason)


def report_again(store: Store, parent: Any, output: Path | None, reporter: Reporter) -> list[str]:
    """The report on a sweep, from the store alone: shown, put onto its parent run, and written to
    the folder `output`. `parent`: its run, as `store.find` gives it. Returns the files' names.
    """
    run_id = parent.info.run_id
    with TemporaryDirectory() as temporary:
        path = store.fetch(run_id, MANIFEST, Path(temporary))
        manifest = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        found = summarise(_records(store, run_id, manifest, {}))
        folder = output or Path(temporary)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = publish(store, Tracker(store, run_id), found, folder)
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written ({error.strerror})") from error
    show(found, reporter)
    return names


def _records(
    store: Store,
    parent: str,
    manifest: Jobs,
    outcomes: Mapping[int, Outcome],
) -> list[JobRecord]:
    """`outcomes`: what is known already, by the number of the job."""
    children = {int(c.data.tags["job"]): c for c in store.children(parent)}
    valid = [job for job in manifest if not job["problem"]]
    records = []
    for number, job in enumerate(valid):
        child, known = children.get(number), outcomes.get(number)
        if child is None:
            status, reason = job.get("status", "NOT RUN"), job.get("reason", "")
            if known:
                status, reason = known.status, known.reason
            records.append(JobRecord(number, job["values"], status, reason))
            continue
        run_id = child.info.run_id
        history = known.history if known else {}
        records.append(
            JobRecord(
                number,
                job["values"],
                child.info.status,
                child.data.tags.get("reason", ""),
                run_id,
                child.data.metrics,
                history or {key: store.history(run_id, key) for key in CURVES},
            )
        )
    invalid = [job for job in manifest if job["problem"]]
    for i, job in enumerate(invalid):
        records.append(JobRecord(len(valid) + i, job["values"], "INVALID", job["problem"]))
    return records


def conclude(
    store: Store,
    parent: Tracker,
    manifest: Jobs,
    outcomes: Sequence[Outcome],
    settings: SweepConfig,
    folder: Path,
    reporter: Reporter,
    load: Load,
    ended: str,
) -> Report:
    """Tests the chosen cell, writes the report and shows it.

    `load`: where the data sets come from.
    `ended`: why the sweep has ended before its time, or ''; then nothing is tested.
    """
    reporter.stop()
    if ended:
        for child in store.children(parent.run_id):
            if child.info.status == "RUNNING":  # of another process, which ends with this one
                Tracker(store, child.info.run_id).finish("KILLED", ended)
    known = dict(enumerate(outcomes))
    jobs = _records(store, parent.run_id, manifest, known)
    chosen = report.choose(report.cells(jobs))
    failures: list[str] = []
    if chosen is not None and settings.test == "chosen" and not ended:
        for job in chosen.finished:
            try:
                run.finish(store, store.get(job.run_id), load)
            except Exception as error:  # the report is made all the same
                failures.append(f"the test of run {job.run_id[:8]} failed: {reason_of(error)}")
        jobs = _records(store, parent.run_id, manifest, known)
    found = summarise(jobs)
    if found.failed:
        failures.insert(0, f"{len(found.failed)} of {len(jobs)} jobs did not finish")
    found = replace(found, failure="; ".join(failures))
    # what has no run is known from here alone
    ended_as = [
        {**job, "status": r.status, "reason": r.reason}
        for job, r in zip(manifest, jobs, strict=True)
    ]
    parent.text(json.dumps({"jobs": ended_as}, indent=1), MANIFEST)
    _record(parent, found)
    publish(store, parent, found, folder)
    show(found, reporter)
    return found


def summarise(jobs: Sequence[JobRecord]) -> Report:
    """Cells, ranking and choice."""
    ranked = report.cells(jobs)
    return Report(list(jobs), ranked, report.choose(ranked))


def show(found: Report, reporter: Reporter) -> None:
    """Every job, the leaderboard, and the choice."""
    reporter.table("jobs", *report.outcomes(found.jobs))
    reporter.table("leaderboard", *report.leaderboard(found.ranked, found.chosen))
    if found.chosen is None:
        cells = [cell for cell in found.ranked if cell.finished]
        if len(cells) > 1:
            reporter.line(
                "no cell is chosen, as there is no validation split and the test set must not "
                "choose: dataset.val_size=5000"
            )
        return
    text = f"chosen on validation: {found.chosen.label}"
    if val := found.chosen.val_accuracy:
        text += f"  validation accuracy {val.percent()}"
    if test := found.chosen.test_accuracy:
        text += f"  test accuracy {test.percent()}"
    reporter.line(text)


def _record(parent: Tracker, found: Report) -> None:
    """The numbers of the choice, and how many jobs there are of each kind, on the parent."""
    finished = sum(job.status == "FINISHED" for job in found.jobs)
    values: dict[str, float] = {
        "jobs/finished": finished,
        "jobs/not_finished": len(found.jobs) - finished,
    }
    if found.chosen is not None:
        for key, spread in (
            ("best/val_accuracy", found.chosen.val_accuracy),
            ("test/accuracy", found.chosen.test_accuracy),
        ):
            if spread is not None:
                values[key] = spread.mean
                values[f"{key}_n"] = spread.n
                if spread.std is not None:
                    values[f"{key}_std"] = spread.std
        parent.tags({"chosen": found.chosen.label})
    parent.metrics(values, 0)


def publish(store: Store, parent: Tracker, found: Report, folder: Path) -> list[str]:
    """Writes the report into `folder` and onto the parent run; figures as images too.

    Returns the names of the files.
    """
    table = report.leaderboard(found.ranked, found.chosen)
    files = {
        "leaderboard.md": report.markdown(*table),
        "leaderboard.csv": report.csv_text(found.ranked, found.chosen),
    }
    if found.chosen is not None:
        files[BEST] = _recipe(store, parent.run_id, found.chosen)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        parent.artifact(folder / name)
    figures = _figures(found)
    for name, figure in figures:
        path = folder / f"{name}.png"
        plots.save(figure, path)
        parent.artifact(path)
        parent.image(f"sweep/{name}", plots.pixels(figure), 0)
    return [*files, *(f"{name}.png" for name, _ in figures)]


def _figures(found: Report) -> list[tuple[str, Any]]:
    short = report.short_names([key for job in found.jobs[:1] for key in job.values])
    figures = []
    for pair in report.pairs(found.ranked, found.chosen):
        over = ", ".join(short.get(key, key) for key in pair.over)
        x, y = short.get(pair.x_key, pair.x_key), short.get(pair.y_key, pair.y_key)
        figure = plots.heat_map(
            (pair.x_key, pair.x_values),
            (pair.y_key, pair.y_values),
            pair.mean,
            pair.std,
            pair.chosen,
            "validation accuracy",
            f"each the best over {over}" if over else "",
        )
        figures.append((f"heat_map_{x}_{y}", figure))
    cells = {cell.label: [job.history for job in cell.jobs if job.history] for cell in found.ranked}
    drawn = {label: runs for label, runs in cells.items() if runs}
    if drawn:
        label = found.chosen.label if found.chosen else None
        figures.append(("learning_curves", plots.sweep_curves(drawn, label, "learning curves")))
    return figures


def _recipe(store: Store, parent: str, chosen: Cell) -> str:
    """The recipe of the chosen cell, with its first seed."""
    job = chosen.finished[0]
    with TemporaryDirectory() as folder:
        config = OmegaConf.load(store.fetch(job.run_id, "config.yaml", Path(folder)))
    assert isinstance(config, DictConfig)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    choices = json.loads(store.get(job.run_id).data.tags["choices"])
    val = chosen.val_accuracy
    comment = f"The best of sweep {parent[:8]}: {chosen.label}"
    if val is not None:
        comment += f", validation accuracy {val.percent()}"
    return report.recipe({str(k): v for k, v in plain.items()}, _options(choices, config), comment)


def _options(choices: Mapping[str, str | None], config: DictConfig) -> dict[str, str | None]:
    """The options of a recipe's groups; None where one is not there, or would bring back a key
    that the run had deleted."""
    options = {group: choices.get(group) for group in report.GROUPS}
    try:
        composed = configs.compose(
            [f"{group}={option}" for group, option in options.items() if option]
        )
    except ConfigError:  # of a --config-dir, or of other code than today's
        return dict.fromkeys(options)

    def keys(where: DictConfig, group: str) -> set[str]:
        return {key for key, _ in configs.leaves(where[group])}

    return {
        group: option if option and keys(composed, group) <= keys(config, group) else None
        for group, option in options.items()
    }
