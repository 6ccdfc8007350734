"""A run once more, from its record in the store alone, and how far the two agree.

With the same code, device, threads, and as many models in its stack, every number is the same to
the last bit. Otherwise sums are rounded otherwise: by some 1e-7 in the first steps, which training
amplifies. Of the seed MLP, 1 thread against 2, the training loss differs by up to 0.05 % in the
first epoch and by up to 28 % within thirty; at a learning rate of 0.3, single validation losses by
83 %. That is as much as what another seed does. So whether both are one computation is told by the
losses of the first steps, and what comes later is held to what rounding alone has been seen to do.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from omegaconf import DictConfig, open_dict, read_write

from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity
from mnist_exp.errors import ConfigError, reason_of
from mnist_exp.formatting import Table, number_or_dash
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import Job, prepare
from mnist_exp.runs.recorder import DIFF, FINGERPRINT, Result, StackPlan
from mnist_exp.runs.saved_model import fetch_config
from mnist_exp.runs.train import LastEpochReached, run_id_of, train, train_stack
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import open_runs_at
from mnist_exp.tracking.store import Store, StoredRun, check_store, store_uri
from mnist_exp.tracking.upload import UploadState

PREFIX, OWNER = "mnist-exp-reproduce-", "owner.json"  # the temporary folder, and whose it is
STEPS = "first steps"
LOSSES = ("train/loss", "val/loss", "test/loss")
# What two runs of one computation may differ by, relative and in nats: either is enough.
TOLERANCES = {
    STEPS: (0.001, 0.0),
    "train/loss": (0.3, 0.01),
    "val/loss": (1.0, 0.02),
    "test/loss": (1.0, 0.02),
}
FIRST_EPOCH = 0.01  # relative, of the first epoch's training loss
CHANGED = "config.yaml: it is not what the run began with (its hash differs from config_hash)"
UNKNOWN = "the first losses are not on record: rounding and another seed cannot be told apart"
TAGS = {  # what numbers can depend on: the tag, and what a person calls it
    "version.mnist_exp": "mnist-exp",
    "version.torch": "torch",
    "version.numpy": "NumPy",
    "version.python": "Python",
    "device": "device",
    "gpu": "GPU",
    "cpu": "instructions of the CPU",
    "threads": "threads",
    "compiled": "compiled step",
    "stack_size": "models in its stack",
}


@dataclass(frozen=True)
class Agreement:
    """Of the losses of one kind, as they were recorded and as they are again."""

    name: str
    compared: int  # epochs, or steps
    first: int | None = None  # that differs
    beyond: int | None = None  # the first one beyond the tolerance
    at: int = 0  # that one, or where the relative difference is greatest
    recorded: float = 0.0  # there
    again: float = 0.0

    @property
    def difference(self) -> float:
        """The relative difference at `at`."""
        return _relative(self.recorded, self.again)

    @property
    def allowed(self) -> str:
        """The tolerance at `at`, for a person."""
        relative, nats = _tolerance(self.name, self.at)
        return f"{100 * relative:g} %" + (f", or {nats:g} nats" if nats else "")


@dataclass(frozen=True)
class Reproduction:
    """What has become of a run the second time."""

    run_id: str
    name: str
    agreements: list[Agreement]
    differences: list[str]  # of config, data, code, versions, device, ...: "threads: 2, now 1"
    same_config: bool = True  # as the run began with
    # of the second run, where it was kept: folder, store, id, and whether MLflow has all of it
    kept: Path | None = None
    store: str = ""
    kept_id: str = ""
    delivered: bool = False

    @property
    def verdict(self) -> str:
        """identical, within tolerance, or different."""
        if all(each.first is None for each in self.agreements):
            return "identical"
        beyond = any(each.beyond is not None for each in self.agreements)
        return "different" if beyond or not self.same_config else "within tolerance"

    def table(self) -> Table:
        """A row for each kind of loss."""
        header = ["loss", "compared", "first to differ", "where", "recorded", "again"]
        header += ["difference", "allowed"]
        rows = []
        for one in self.agreements:
            unit = {STEPS: "steps", "test/loss": "at the end"}.get(one.name, "epochs")
            row = [one.name, f"{one.compared} {unit}"]
            if one.first is None:
                row += ["none: identical", *[""] * 5]
            else:
                where = f"{one.at} ({'greatest' if one.beyond is None else 'too great'})"
                row += [
                    str(one.first),
                    where,
                    number_or_dash(one.recorded, ".8g"),
                    number_or_dash(one.again, ".8g"),
                ]
                row += [number_or_dash(100 * one.difference, ".3g") + " %", one.allowed]
            rows.append(row)
        return header, rows


def reproduce(
    store: Store,
    stored: StoredRun,
    reporter: Reporter,
    *,
    keep: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    root: str | None = None,
) -> Reproduction:
    """Train a run again from its record, and compare the loss of every epoch.

    Args:
        store: the store that has the run.
        stored: the run.
        reporter: shows how the second run gets on.
        keep: the store for the second run, which is removed otherwise.
        threads: in place of the recorded number.
        device: in place of the recorded one.
        root: the folder of its data set, if not the recorded one.

    Returns:
        How far the two agree; that the second run fails is one of the differences.

    Raises:
        ConfigError: if the record does not tell enough, or the machine lacks something.
    """
    with _temporary_folder() as folder:
        record = _read_record(store, stored, folder)
        _apply_recorded_settings(record, threads, device, root)
        if keep is not None:
            tracking = record.config.tracking
            check_store(keep, tracking.experiment, option="--keep")
            tracking.tags = {**tracking.tags, "reproduces": stored.id}
        try:
            job = _prepare(record, None if keep else folder / "run")
        except ConfigError as error:
            reason = _refusal(str(error), threads, device)
            raise ConfigError(f"run {stored.id} cannot be trained here, {reason}") from error
        outcome = _train(job, record, reporter, keep, folder)
        return _compare(record, job, outcome, keep)


@dataclass(frozen=True)
class _Record:
    """What a store has of the run that is to be reproduced."""

    run: StoredRun
    config: DictConfig
    is_unchanged: bool  # the config is what the run began with
    first_losses: dict[int, float]  # by step
    losses: dict[str, dict[int, float]]  # of each key of LOSSES, by epoch
    diff: str  # uncommitted changes of its code


def _read_record(store: Store, run: StoredRun, folder: Path) -> _Record:
    """Return what is needed of a run's record. `folder`: where files of it are left."""
    if run.status == "RUNNING":
        raise ConfigError(f"run {run.id}: it is still running. To reproduce it, wait for its end")
    first_losses = run.parsed_tag(FINGERPRINT, _by_step, dict[int, float]())
    run.choices()  # which may be damaged
    losses = {key: dict(store.history(run.id, key)) for key in LOSSES}
    if not losses["train/loss"]:
        raise ConfigError(f"run {run.id}: no epoch of it is recorded; {run.explain_status()}")
    config = fetch_config(store, run.id, folder)
    is_unchanged = run.tags.get("config_hash") in (None, identity(config))
    diff = _text(store.fetch(run.id, DIFF, folder)) if store.has(run.id, DIFF) else ""
    return _Record(run, config, is_unchanged, first_losses, losses, diff)


def _apply_recorded_settings(
    record: _Record, threads: int | None, device: str | None, root: str | None
) -> None:
    """Set in the config what it leaves to the machine: as recorded, or as asked for."""
    config, tags = record.config, record.run.tags
    if root is not None:
        config.dataset.root = root
    recorded = record.run.parsed_tag("threads", int, config.training.threads)
    config.training.threads = recorded if threads is None else threads
    if device is not None or "device" in tags:
        config.training.device = tags["device"] if device is None else device
    if "compiled" in tags:
        config.training.compile = "always" if tags["compiled"] == "true" else "never"


def _prepare(record: _Record, folder: Path | None) -> Job:
    """Return the run as a job, to be trained in `folder` or else in the usual one."""
    composed = record.config.copy()
    with open_dict(composed):
        composed.hydra = compose([]).hydra
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.runtime.choices = record.run.choices()
        # as it is now: it says the time
        composed.hydra.run.dir = str(folder or composed.hydra.run.dir)
    return prepare(composed)


def _train(
    job: Job, record: _Record, reporter: Reporter, keep: str | None, folder: Path
) -> Result | Exception:
    """Return what the second run has come to, which goes as far as the first one was recorded."""
    defer_test = not record.losses["test/loss"]
    last = max(record.losses["train/loss"])
    last_epoch = last if last < job.config.training.epochs else None
    if keep is None:
        uri = store_uri(job.config.tracking.uri, paths.output_root())
        plan = StackPlan([job], [job.folder], uri, open_runs_at(folder), defer_test=defer_test)
        return train_stack(plan, reporter, last_epoch=last_epoch)[0]
    try:
        return train(
            *(job, job.folder, reporter), store=keep, defer_test=defer_test, last_epoch=last_epoch
        )
    except ConfigError:  # nothing was trained
        raise
    except Exception as error:  # a model can raise anything
        return error


def _compare(
    record: _Record, job: Job, outcome: Result | Exception, keep: str | None
) -> Reproduction:
    """Return how far the record and the second run agree, and what differs between them."""
    run, history = record.run, RunHistory.of(job.folder)
    agreements = [
        agreement(STEPS, record.first_losses, _by_step(history.tags.get(FINGERPRINT, "[]"))),
        *(agreement(key, record.losses[key], history.metrics.get(key, {})) for key in LOSSES),
    ]
    differences = []
    if isinstance(outcome, Exception) and not isinstance(outcome, LastEpochReached):
        differences.append(f"the second run failed: {reason_of(outcome)}")
    if not record.is_unchanged:
        differences.append(CHANGED)
    if not record.first_losses:
        differences.append(UNKNOWN)
    differences += _differences(record, job, history.tags)
    return Reproduction(
        run.id,
        run.name,
        [agreement for agreement in agreements if agreement.compared],
        differences,
        same_config=record.is_unchanged,
        kept=job.folder if keep else None,
        store=history.uri,
        kept_id=run_id_of(job.folder) if keep else "",
        delivered=UploadState.of(job.folder, history.uri).ended,
    )


def _differences(record: _Record, job: Job, tags: Mapping[str, str]) -> list[str]:
    """Return what differs of all that numbers can depend on. `tags`: of the second run."""
    recorded, differences = record.run.tags, []
    digest, present = record.run.dataset_digest, job.load(job.config.dataset).digest
    if digest not in ("", present):
        differences.append(f"data: SHA-256 {digest[:12]}..., now {present[:12]}...")
    commit = "mlflow.source.git.commit"
    if recorded.get(commit) != tags.get(commit):
        before, now = recorded.get(commit, "?")[:8], tags.get(commit, "?")[:8]
        differences.append(f"code: commit {before}, now {now}")
    elif record.diff != _text(job.folder / DIFF):
        differences.append("code: the uncommitted changes (uncommitted.diff)")
    for tag, name in TAGS.items():
        if tag in recorded and recorded[tag] != tags.get(tag):
            differences.append(f"{name}: {recorded[tag]}, now {tags.get(tag, '?')}")
    return differences


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder; remove those that processes which were killed have left."""
    for owner in Path(gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # another user's
            if is_running(json.loads(owner.read_text())) is False:
                shutil.rmtree(owner.parent)
    with TemporaryDirectory(prefix=PREFIX) as folder:
        Path(folder, OWNER).write_text(json.dumps(process_identity()))
        yield Path(folder)


def _refusal(error: str, threads: int | None, device: str | None) -> str:
    """Return why a run cannot be trained again, and with which options, if any were typed."""
    options = []
    if threads is not None:
        options.append(f"--threads {threads}")
    if device is not None:
        options.append(f"--device {device}")
    is_device = error.startswith("training.device=")
    hint = ". To choose another device: --device cpu" if is_device else ""
    return f"{' and '.join(options) or 'as its record says'}: {error}{hint}"


def agreement(name: str, recorded: Mapping[int, float], again: Mapping[int, float]) -> Agreement:
    """Compares losses by epoch, or by step. What was not recorded does not count."""
    first = beyond = None
    at, worst = 0, 0.0
    for number in sorted(recorded):
        before, now = recorded[number], again.get(number, math.nan)
        if before == now or (math.isnan(before) and math.isnan(now)):
            continue
        first = number if first is None else first
        if beyond is None and not _tolerated(name, number, before, now):
            beyond = number
        if not _relative(before, now) <= worst:
            at, worst = number, _relative(before, now)
    at = at if beyond is None else beyond
    values = (recorded[at], again.get(at, math.nan)) if at else (0.0, 0.0)
    return Agreement(name, len(recorded), first, beyond, at, *values)


def _tolerance(name: str, number: int) -> tuple[float, float]:
    """Relative, and in nats, of an epoch or a step."""
    is_first = name == "train/loss" and number == 1
    return (FIRST_EPOCH, 0.0) if is_first else TOLERANCES[name]


def _tolerated(name: str, number: int, before: float, now: float) -> bool:
    relative, nats = _tolerance(name, number)
    return _relative(before, now) <= relative or abs(before - now) <= nats


def _relative(before: float, now: float) -> float:
    """nan where one is missing."""
    return abs(now - before) / max(abs(before), 1e-12)


def _by_step(text: str) -> dict[int, float]:
    """Return the losses in a tag by their step: 1, 2, ..."""
    return dict(enumerate(map(float, json.loads(text)), start=1))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
