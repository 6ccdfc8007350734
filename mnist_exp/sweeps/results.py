"""A sweep in the store: its parent run, what its jobs have come to, and the report on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import Config, SweepConfig, leaves
from mnist_exp.errors import ConfigError, reason_of
from mnist_exp.figures import style
from mnist_exp.figures.curves import sweep_curves
from mnist_exp.figures.matrices import heat_map
from mnist_exp.runs import saved_model as saved
from mnist_exp.runs import train as run
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import Load
from mnist_exp.runs.provenance import described, process_tags
from mnist_exp.sweeps import report
from mnist_exp.sweeps.report import Cell, JobRecord
from mnist_exp.system import files
from mnist_exp.tracking import journal
from mnist_exp.tracking.run_log import Beginning, RunHistory, RunWriter, open_runs_at
from mnist_exp.tracking.store import Store, StoredRun, UploadState
from mnist_exp.tracking.upload import Uploader

CURVES = ("train/loss", "val/loss", "val/accuracy")
BEST = "best.yaml"  # the recipe of the chosen cell
DESCRIBED = 20  # cells of the leaderboard that the parent run's description has room for
FLUSH_SECONDS = 5.0  # that the report waits for MLflow
MANIFEST = "sweep.json"  # the jobs, those included that have no run


@dataclass(frozen=True)
class Manifest:
    """What a sweep consists of, in its folder and on its parent run."""

    launcher: str
    settings: Mapping[str, Any]  # the sweep's part of the config
    # values: what was swept; problem: why it cannot be run, or ''; folder: of its record; once the
    # sweep has ended also status and reason, as a job that was not run has no record
    jobs: Sequence[Mapping[str, Any]]
    stacks: Sequence[Sequence[int]] | None = None  # which jobs are trained together

    @classmethod
    def of(cls, folder: Path) -> "Manifest":
        """Raises ConfigError."""
        try:
            return cls(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{folder / MANIFEST}: cannot be read: {error}") from error

    @property
    def valid(self) -> list[Mapping[str, Any]]:
        """The jobs that can be run, by their number."""
        return [job for job in self.jobs if not job["problem"]]

    @property
    def invalid(self) -> list[Mapping[str, Any]]:
        """The other jobs, which are numbered after those."""
        return [job for job in self.jobs if job["problem"]]

    def save(self, folder: Path) -> None:
        files.write(folder / MANIFEST, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class Outcome:
    """What a job has come to, as its launcher hands it back."""

    status: str  # FINISHED, FAILED, KILLED; NOT RUN
    reason: str = ""


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


def open_parent(config: Config, uri: str, manifest: Manifest, folder: Path) -> RunWriter:
    """The record of the run that the jobs' runs are nested under."""
    jobs = manifest.jobs
    swept: dict[str, list[str]] = {}
    for job in jobs:
        for key, value in job["values"].items():
            if value not in swept.setdefault(key, []):
                swept[key].append(value)
    tags = {
        **process_tags(),
        "sweep": "true",
        "launcher": manifest.launcher,
        "output_dir": str(folder),
        "dataset": config.dataset.name,
    }
    name = f"sweep {' x '.join(report.short_names(list(swept)).values())} ({len(jobs)} jobs)"
    beginning = Beginning(name, uri, config.tracking.experiment, tags, kind="sweep")
    parent = RunWriter(folder, open_runs_at(paths.output_root()), beginning)
    parent.params({f"sweep.{key}": ",".join(values) for key, values in swept.items()})
    parent.artifact(folder / MANIFEST)
    return parent


def outcome_in(folder: Path) -> Outcome:
    """What the record of a job says that it has come to."""
    story = RunHistory.of(folder)
    if not story.status:
        return Outcome("FAILED", "its record has no end")
    return Outcome(story.status, story.reason)


def mark_job_killed(folder: Path, reason: str) -> Outcome:
    """Ends the record of a job whose process died without a word, unless it had ended before."""
    story = RunHistory.of(folder)
    if story.key and not story.status and journal.mark_killed(folder, story.owner, reason):
        with (folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(reason + "\n")
    story = RunHistory.of(folder)
    return Outcome(story.status, story.reason) if story.status else Outcome("KILLED", reason)


def report_again(
    store: Store, parent: StoredRun, output: Path | None, suffix: str, reporter: Reporter
) -> list[str]:
    """The report on a sweep, from the store alone: shown, put onto its parent run, and written to
    the folder `output`, with figures of the kind `suffix`. Returns the names of the files on it.
    """
    run_id = parent.id
    with TemporaryDirectory() as temporary:
        found = summarise(of_store(store, run_id))
        recipe = ""
        if found.chosen is not None:
            best = found.chosen.finished[0].run_id
            config = saved.fetch_config(store, best, Path(temporary))
            choices = store.get(best).choices()
            recipe = _recipe(config, choices, run_id, found.chosen)
        figures = draw(found)
        if output is not None:
            with files.asked_for("--output", output):
                output.mkdir(parents=True, exist_ok=True)
                write(found, figures, recipe, output, suffix)
        written = write(found, figures, recipe, Path(temporary))
        for file in written:
            store.put(run_id, file)
    show(found, reporter)
    return [file.name for file in written]


def of_store(store: Store, parent: str) -> list[JobRecord]:
    """Every job of a sweep, from the store alone. parent: the id of its run."""
    with TemporaryDirectory() as temporary:
        store.fetch(parent, MANIFEST, Path(temporary))
        manifest = Manifest.of(Path(temporary))
    found = {}
    for number, child in store.children(parent).items():
        history = {key: store.history(child.id, key) for key in CURVES}
        reason = child.tags.get("reason", "")
        found[number] = JobRecord(
            number, {}, child.status, reason, child.id, child.metrics, history
        )
    return _records(manifest, found)


def _from_journals(manifest: Manifest, outcomes: Mapping[int, Outcome]) -> list[JobRecord]:
    """`outcomes`: what the launcher says of jobs, by their number."""
    found = {}
    for number, job in enumerate(manifest.valid):
        folder = Path(job["folder"])
        story = RunHistory.of(folder)
        if story.key:
            history = {key: story.history(key) for key in CURVES}
            run_id = UploadState.of(folder).run_id or story.key
            best = max((value for _, value in history["val/accuracy"]), default=None)
            so_far = {} if best is None else {"best/val_accuracy": best}  # of one that was stopped
            metrics = so_far | story.newest()
            found[number] = JobRecord(
                number, {}, story.status or "RUNNING", story.reason, run_id, metrics, history
            )
        elif number in outcomes:
            found[number] = JobRecord(number, {}, outcomes[number].status, outcomes[number].reason)
    return _records(manifest, found)


def _records(manifest: Manifest, found: Mapping[int, JobRecord]) -> list[JobRecord]:
    """Every job of a sweep. `found`: what is known of those that were run, by their number."""
    records = []
    for number, job in enumerate(manifest.valid):
        unknown = JobRecord(number, {}, job.get("status", "NOT RUN"), job.get("reason", ""))
        records.append(replace(found.get(number, unknown), values=job["values"]))
    for number, job in enumerate(manifest.invalid, start=len(records)):
        records.append(JobRecord(number, job["values"], "INVALID", job["problem"]))
    return records


def conclude(
    parent: RunWriter,
    manifest: Manifest,
    outcomes: Mapping[int, Outcome],
    settings: SweepConfig,
    reporter: Reporter,
    load: Load,
    uploader: Uploader,
    ended: str,
) -> Report:
    """Tests the chosen cell, writes the report and shows it.

    `outcomes`: what the launcher says of jobs, by their number. `load`: where the data sets come
    from. `ended`: why the sweep has ended before its time, or ''; then nothing is tested.
    """
    reporter.stop()
    folder = parent.folder
    if ended:
        for job in manifest.valid:
            mark_job_killed(Path(job["folder"]), ended)
    unstarted = Outcome("NOT RUN", ended)
    known = dict.fromkeys(range(len(manifest.valid)), unstarted) if ended else {}
    known |= outcomes
    jobs = _from_journals(manifest, known)
    chosen = report.choose(report.cells(jobs))
    failures: list[str] = []
    if chosen is not None and settings.test == "chosen" and not ended:
        for tested in chosen.finished:
            if tested.metric("test/accuracy") is not None:
                continue  # by an earlier try: the test set is read once
            try:
                run.record_deferred_test(Path(manifest.jobs[tested.number]["folder"]), load)
            except Exception as error:  # the report is made all the same
                failures.append(f"the test of {chosen.label} failed: {reason_of(error)}")
    if not ended:
        uploader.flush(FLUSH_SECONDS)  # so that the report has MLflow's names of the runs
    jobs = _from_journals(manifest, known)
    found = summarise(jobs)
    if found.failed:
        failures.insert(0, f"{len(found.failed)} of {len(jobs)} jobs did not finish")
    found = replace(found, failure="; ".join(failures))
    # what has no run is known from here alone
    ended_as = [
        {**job, "status": r.status, "reason": r.reason}
        for job, r in zip(manifest.jobs, jobs, strict=True)
    ]
    replace(Manifest.of(folder), jobs=ended_as).save(folder)
    parent.artifact(folder / MANIFEST)
    _record(parent, found)
    recipe = ""
    if found.chosen is not None:
        best = Path(manifest.jobs[found.chosen.finished[0].number]["folder"])
        choices, name = (
            json.loads(RunHistory.of(best).tags["choices"]),
            UploadState.of(folder).run_id,
        )
        config = saved.load_config(best / "config.yaml")
        recipe = _recipe(config, choices, name or folder.name, found.chosen)
    figures = draw(found)
    for path in write(found, figures, recipe, folder):
        parent.artifact(path)
    for name, figure in figures.items():
        parent.image(f"sweep/{name}", style.pixels(figure), 0)
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
    is_choice = found.chosen.val_accuracy is not None
    text = f"{'chosen on validation' if is_choice else 'the only cell'}: {found.chosen.label}"
    if val := found.chosen.val_accuracy:
        text += f"  validation accuracy {val.percent()}"
    if test := found.chosen.test_accuracy:
        text += f"  test accuracy {test.percent()}"
    reporter.line(text)


def _record(parent: RunWriter, found: Report) -> None:
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
                values[key] = round(spread.mean, 10)  # 0.918, and not 0.9179999999999999
                values[f"{key}_n"] = spread.n
                if spread.std is not None:
                    values[f"{key}_std"] = spread.std
        header, rows = report.leaderboard(found.ranked, found.chosen)
        table = report.markdown(header, rows[:DESCRIBED])
        best = described(
            f"{table}\nTo train the best again:", f"experiments={parent.folder / BEST}"
        )
        parent.tags({"chosen": found.chosen.label, **best})
    # a sweep that is resumed comes to another end: its number is the step
    tries = RunHistory.of(parent.folder).history("jobs/finished")
    parent.metrics(values, len(tries))


def write(
    found: Report, figures: Mapping[str, Any], recipe: str, folder: Path, suffix: str = "png"
) -> list[Path]:
    """Writes the report into `folder`; the recipe of the chosen cell if there is one."""
    table = report.leaderboard(found.ranked, found.chosen)
    files = {
        "leaderboard.md": report.markdown(*table),
        "leaderboard.csv": report.csv_text(found.ranked, found.chosen),
        **({BEST: recipe} if recipe else {}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        style.save(figure, folder / f"{name}.{suffix}")
    return [folder / name for name in (*files, *(f"{name}.{suffix}" for name in figures))]


def draw(found: Report) -> dict[str, Any]:
    """Heat maps of the swept numbers, and the curves of all jobs, by name."""
    short = report.short_names([key for job in found.jobs[:1] for key in job.values])
    figures = {}
    for pair in report.pairs(found.ranked, found.chosen):
        over = ", ".join(short.get(key, key) for key in pair.over)
        x, y = short.get(pair.x_key, pair.x_key), short.get(pair.y_key, pair.y_key)
        figure = heat_map(
            (pair.x_key, pair.x_values),
            (pair.y_key, pair.y_values),
            pair.mean,
            pair.std,
            pair.chosen,
            "validation accuracy",
            f"each the best over {over}" if over else "",
        )
        figures[f"heat_map_{x}_{y}"] = figure
    cells = {cell.label: [job.history for job in cell.jobs if job.history] for cell in found.ranked}
    drawn = {label: runs for label, runs in cells.items() if runs}
    if drawn:
        label = found.chosen.label if found.chosen else None
        figures["learning_curves"] = sweep_curves(drawn, label, "learning curves")
    return figures


def _recipe(config: DictConfig, choices: Mapping[str, str | None], sweep: str, chosen: Cell) -> str:
    """The recipe of the chosen cell, from the resolved config of the run with its first seed.

    choices: which option that had in each group.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    val = chosen.val_accuracy
    comment = f"The best of sweep {sweep[:8]}: {chosen.label}"
    if val is not None:
        comment += f", validation accuracy {val.percent()}"
    options = _options(choices, config)
    return report.recipe({str(k): v for k, v in plain.items()}, options, comment)


def _options(choices: Mapping[str, str | None], config: DictConfig) -> dict[str, str | None]:
    """The options of a recipe's groups; None where one is not there, or would bring back a key
    that the run had deleted."""
    options = {group: choices.get(group) for group in report.GROUPS}
    try:
        composed = compose([f"{group}={option}" for group, option in options.items() if option])
    except ConfigError:  # of a --config-dir, or of other code than today's
        return dict.fromkeys(options)

    def keys(where: DictConfig, group: str) -> set[str]:
        return {key for key, _ in leaves(where[group])}

    return {
        group: option if option and keys(composed, group) <= keys(config, group) else None
        for group, option in options.items()
    }
