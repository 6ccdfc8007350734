"""Training a run again from its record in the store alone, and comparing the two.

With the same code, device, threads, and as many models in its stack, every number is the same to
the last bit. Otherwise sums are rounded otherwise: by some 1e-7 in the first steps, which training
amplifies. Of the seed MLP, 1 thread against 2, the training loss differs by up to 0.05 % in the
first epoch and by up to 28 % within thirty; at a learning rate of 0.3, single validation losses by
83 %. That is as much as what another seed does. So whether both are one computation is told by the
losses of the first steps, and what comes later is held to what rounding alone has been seen to do.

Convolutions and bfloat16 round more, and so `Rounding` allows them more. torch's batch norm is 20
to 150 times less exact in the memory layout that a convolutional model has alone on a CPU than in
the usual one, which it has in a stack. In the first eight steps of cnn and resnet, between threads,
layouts, and alone and in a stack, the losses differed by up to 0.0001 % in the first, 0.02 % in the
second, 0.7 % in the third and 12 % in a later step, the most at a learning rate at which the loss
rises to 9; in bfloat16 by up to 0.03 %, 0.8 %, 4 % and 40 %, and those of mlp in bfloat16 by up to
0.002 %, 0.02 %, 0.05 % and 0.4 %. That was with 128 images in a batch; with 32, the first losses of
small models in bfloat16 differed by up to 0.01 %, and by 0.2 % with convolutions. Seed 1 differs
from seed 0 by 0.1 to 2 % in the first step, and where there are convolutions by 1 to 10 % in the
second.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch
from omegaconf import DictConfig, open_dict, read_write

from mnist_exp.config import paths
from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity
from mnist_exp.errors import ConfigError, reason_of
from mnist_exp.formatting import Table, number_or_dash
from mnist_exp.run.console import Reporter
from mnist_exp.run.job import Job, prepare
from mnist_exp.run.recorder import FINGERPRINT, Result, StackPlan
from mnist_exp.run.stored_config import fetch_config
from mnist_exp.run.train import LastEpochReached, run_id_of, train, train_stack
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking.address import normalised, store_uri
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.kept_files import DIFF
from mnist_exp.tracking.run_log import open_runs_at
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from mnist_exp.tracking.stored_run import StoredRun
from mnist_exp.tracking.upload import UploadState
from mnist_exp.tracking.uploader import Uploader

PREFIX, OWNER = "mnist-exp-reproduce-", "owner.json"  # the temporary folder, and whose it is
STEPS = "first steps"
LOSSES = ("train/loss", "val/loss", "test/loss")
# What two runs of one computation may differ by, relative and in nats: either is enough.
TOLERANCES = {"train/loss": (0.3, 0.01), "val/loss": (1.0, 0.02), "test/loss": (1.0, 0.02)}
# Relative, of models that round little: of the first steps, and the first epoch's training loss.
FIRST_STEPS, FIRST_EPOCH = 0.001, 0.01
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
class Rounding:
    """The two properties of a model on which it depends how much its losses may be rounded."""

    convolutions: bool = False  # whether the model has such layers
    bfloat16: bool = False  # whether it computes in bfloat16

    def tolerance(self, name: str, number: int) -> tuple[float, float]:
        """Return what a loss may differ by, relative and in nats.

        Args:
            name: STEPS, or a key of TOLERANCES.
            number: The step, or the epoch, from 1.
        """
        rounds_little = not (self.convolutions or self.bfloat16)
        if name == STEPS and rounds_little:
            return FIRST_STEPS, 0.0
        if name == STEPS:  # the first loss is that of the initial weights; each update amplifies
            first = 0.002 if self.convolutions and self.bfloat16 else 0.0005
            return min(first * 10.0 ** (number - 1), 1.0), 0.0
        if name == "train/loss" and number == 1 and rounds_little:
            return FIRST_EPOCH, 0.0
        return TOLERANCES[name]


@dataclass(frozen=True)
class Agreement:
    """The comparison of the losses of one kind: as they were recorded, and as they are again."""

    name: str
    compared: int  # epochs, or steps
    first_different: int | None = None
    first_beyond: int | None = None  # the tolerance
    shown: int = 0  # the first one beyond, or the one where the relative difference is greatest
    recorded: float = 0.0  # there
    again: float = 0.0
    allowed: tuple[float, float] = 0.0, 0.0  # the tolerance there: relative, and in nats

    @classmethod
    def of(
        cls,
        name: str,
        recorded: Mapping[int, float],
        again: Mapping[int, float],
        rounding: Rounding,
    ) -> "Agreement":
        """Compare the losses of one kind. What was not recorded does not count.

        Args:
            name: STEPS, or a key of TOLERANCES.
            recorded: The losses of the first run by epoch, or by step.
            again: Those of the second run.
            rounding: What is known of the model.
        """
        pairs = {n: (recorded[n], again.get(n, math.nan)) for n in sorted(recorded)}
        differences = {
            n: _relative(before, now)
            for n, (before, now) in pairs.items()
            if before != now and not (math.isnan(before) and math.isnan(now))
        }
        if not differences:
            return cls(name, len(recorded))
        first_beyond = None
        for n, difference in differences.items():
            relative, nats = rounding.tolerance(name, n)
            before, now = pairs[n]
            if not (difference <= relative or abs(before - now) <= nats):
                first_beyond = n
                break
        shown = first_beyond or max(differences, key=differences.__getitem__)
        allowed = rounding.tolerance(name, shown)
        start = min(differences)
        return cls(name, len(recorded), start, first_beyond, shown, *pairs[shown], allowed)

    def row(self) -> list[str]:
        """Return the row of the table: all is identical, or where it differs, and by how much."""
        unit = {STEPS: "steps", "test/loss": "at the end"}.get(self.name, "epochs")
        start = [self.name, f"{self.compared} {unit}"]
        if self.first_different is None:
            return [*start, "none: identical", "", "", "", "", ""]
        relative, nats = self.allowed
        difference = _relative(self.recorded, self.again)
        return [
            *start,
            str(self.first_different),
            f"{self.shown} ({'greatest' if self.first_beyond is None else 'too great'})",
            number_or_dash(self.recorded, ".8g"),
            number_or_dash(self.again, ".8g"),
            number_or_dash(100 * difference, ".3g") + " %",
            f"{100 * relative:g} %" + (f", or {nats:g} nats" if nats else ""),
        ]


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with the same run trained again."""

    run_id: str
    name: str
    agreements: list[Agreement]
    differences: list[str]  # of config, data, code, versions, device, ...: "threads: 2, now 1"
    same_config: bool = True  # as the run began with
    # of the second run, where it was kept: folder, store, id, and whether MLflow has all of it
    kept: Path | None = None
    store: str = ""
    kept_id: str = ""
    uploaded: bool = False

    @property
    def verdict(self) -> str:
        """The result: identical, within tolerance, or different."""
        if all(agreement.first_different is None for agreement in self.agreements):
            return "identical"
        beyond = any(agreement.first_beyond is not None for agreement in self.agreements)
        return "different" if beyond or not self.same_config else "within tolerance"

    def table(self) -> Table:
        """Return a table with a row for each kind of loss."""
        header = ["loss", "compared", "first to differ", "where", "recorded", "again"]
        header += ["difference", "allowed"]
        return Table(header, [agreement.row() for agreement in self.agreements])


def reproduce(
    store: Store,
    run: StoredRun,
    reporter: Reporter,
    *,
    keep: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    root: str | None = None,
) -> Reproduction:
    """Train a run again from its record, and compare the loss of every epoch.

    Args:
        store: The store that has the run.
        run: The run.
        reporter: Shows how the second run gets on.
        keep: The store for the second run, which is removed otherwise.
        threads: In place of the recorded number.
        device: In place of the recorded one.
        root: The folder of its data set, if not the recorded one.

    Returns:
        How far the two agree. That the second run fails is one of the differences.

    Raises:
        ConfigError: The record does not tell enough, or the machine lacks something.
    """
    with _temporary_folder() as folder:
        record = _read_record(store, run, folder)
        config, tracking = record.config, record.config.tracking
        tracking.on_end = None  # it was told of the first run's end
        if root is not None:
            config.dataset.root = root
        if threads is not None:
            config.training.threads = threads
        if device is not None:
            config.training.device = device
        if keep is not None:
            keep = normalised(keep)
            check_store(keep, tracking.experiment, option="--keep")
            tracking.tags = {**tracking.tags, "reproduces": run.id}
        try:
            job = _prepare(record, None if keep else folder / "run")
        except ConfigError as error:
            values = {"--threads": threads, "--device": device}
            options = [f"{name} {value}" for name, value in values.items() if value is not None]
            reason = f"{' and '.join(options) or 'as its record says'}: {error}"
            if str(error).startswith("training.device="):
                reason += ". To choose another device: --device cpu"
            raise ConfigError(f"run {run.id} cannot be trained here, {reason}") from error
        outcome = _train(job, record, reporter, keep, folder)
        return _compare(record, job, outcome, keep)


@dataclass(frozen=True)
class _Record:
    """The record of the run that is to be reproduced, as far as it is needed."""

    run: StoredRun
    config: DictConfig  # with the threads, the device and the kind of step that were used
    is_unchanged: bool  # the config is what the run began with
    losses: dict[str, dict[int, float]]  # of STEPS by step, of each key of LOSSES by epoch
    diff: str  # uncommitted changes of its code


def _read_record(store: Store, run: StoredRun, folder: Path) -> _Record:
    """Return what is needed of a run's record. `folder`: where files of it are left."""
    if run.status == "RUNNING":
        raise ConfigError(f"run {run.id}: it is still running. To reproduce it, wait for its end")
    losses = {STEPS: run.parsed_tag(FINGERPRINT, _by_step, dict[int, float]())}
    run.choices()  # raises ConfigError if they are damaged
    losses |= {key: dict(store.history(run.id, key)) for key in LOSSES}
    if not losses["train/loss"]:
        raise ConfigError(f"run {run.id}: no epoch of it is recorded; {run.explain_status()}")
    config = fetch_config(store, run.id, folder)
    is_unchanged = run.tags.get("config_hash") in (None, identity(config))
    training = config.training
    training.threads = run.parsed_tag("threads", int, training.threads)
    training.device = run.tags.get("device", training.device)
    if "compiled" in run.tags:
        training.compile = "always" if run.tags["compiled"] == "true" else "never"
    diff = _text(store.fetch(run.id, DIFF, folder)) if store.has(run.id, DIFF) else ""
    return _Record(run, config, is_unchanged, losses, diff)


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
    """Train the second run as far as the first one was recorded, and return its outcome.

    `keep`: the store for it, if it is to be kept.
    """
    defer_test = not record.losses["test/loss"]
    last = max(record.losses["train/loss"])
    # one that was tested has reached its end, by its patience perhaps
    last_epoch = last if defer_test and last < job.config.training.epochs else None
    if keep is None:
        uri = store_uri(job.config.tracking.uri, paths.output_root())
        plan = StackPlan([job], [job.folder], uri, open_runs_at(folder), defer_test=defer_test)
        return train_stack(plan, reporter, last_epoch=last_epoch)[0]
    try:
        with Uploader() as uploader:
            return train(
                job,
                job.folder,
                reporter,
                uploader,
                store=keep,
                defer_test=defer_test,
                last_epoch=last_epoch,
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
    again = {STEPS: _by_step(history.tags.get(FINGERPRINT, "[]")), **history.metrics}
    differences = []
    if isinstance(outcome, Exception) and not isinstance(outcome, LastEpochReached):
        differences.append(f"the second run failed: {reason_of(outcome)}")
    if not record.is_unchanged:
        differences.append(CHANGED)
    if not record.losses[STEPS]:
        differences.append(UNKNOWN)
    differences += _differences(record, job, history.tags)
    rounding = Rounding(job.has_convolutions, job.precision == torch.bfloat16)
    return Reproduction(
        run.id,
        run.name,
        [
            Agreement.of(name, losses, again.get(name, {}), rounding)
            for name, losses in record.losses.items()
            if losses
        ],
        differences,
        same_config=record.is_unchanged,
        kept=job.folder if keep else None,
        store=history.uri,
        kept_id=run_id_of(job.folder) if keep else "",
        uploaded=UploadState.of(job.folder, history.uri).ended,
    )


def _differences(record: _Record, job: Job, tags: Mapping[str, str]) -> list[str]:
    """Return what differs of all that numbers can depend on. `tags`: of the second run."""
    recorded, differences = record.run.tags, []
    digest, present = record.run.dataset_digest, job.load(job.config.dataset).digest
    if digest not in ("", present):
        differences.append(f"data: SHA-256 {digest[:12]}..., now {present[:12]}...")
    commits = [t.get("mlflow.source.git.commit", "?")[:8] for t in (recorded, tags)]
    if commits[0] != commits[1]:
        differences.append(f"code: commit {commits[0]}, now {commits[1]}")
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


def _relative(before: float, now: float) -> float:
    """Return the relative difference; nan where one is missing."""
    return abs(now - before) / max(abs(before), 1e-12)


def _by_step(text: str) -> dict[int, float]:
    """Return the losses in a tag by their step: 1, 2, ..."""
    return dict(enumerate(map(float, json.loads(text)), start=1))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
