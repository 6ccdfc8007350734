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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from omegaconf import DictConfig, open_dict, read_write

from mnist_exp.config.compose import compose
from mnist_exp.config.schema import identity
from mnist_exp.errors import ConfigError, RunFailed, reason_of
from mnist_exp.formatting import Table, number_or_dash
from mnist_exp.runs import saved_model as saved
from mnist_exp.runs import train as run
from mnist_exp.runs.console import Reporter
from mnist_exp.runs.job import Job, prepare
from mnist_exp.runs.recorder import DIFF, FIRST_LOSSES, Result
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking.run_log import RunHistory, open_runs_at
from mnist_exp.tracking.store import Store, StoredRun, UploadState, check_store
from mnist_exp.training.events import Epoch, Progress

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


class _Compared(RunFailed):
    """All that is on record is there again."""


class _Until(Reporter):
    """Ends the second run after the last epoch that the first one has recorded."""

    def __init__(self, inner: Reporter, last: int) -> None:
        self.inner, self.last = inner, last

    def start(self, names: Sequence[str], device: str, epochs: int) -> None:
        self.inner.start(names, device, epochs)

    def progress(self, record: Progress) -> None:
        self.inner.progress(record)

    def line(self, text: str) -> None:
        self.inner.line(text)

    def stop(self) -> None:
        self.inner.stop()

    def epoch(self, record: Epoch) -> None:
        self.inner.epoch(record)
        if record.epoch == self.last:
            raise _Compared(f"the first run has recorded no more than {self.last} epochs")


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
    """Trains a run again, and compares the loss of every epoch.

    keep: the store for the second run, which is gone otherwise. threads, device: in place of the
    recorded ones; root: where its data is by now. That the second run fails is one of the
    differences. Raises ConfigError where the record does not tell enough, or the machine lacks
    something.
    """
    run_id = stored.id
    if stored.status == "RUNNING":
        raise ConfigError(f"run {run_id}: it is still running. To reproduce it, wait for its end")
    steps = stored.parsed_tag(FIRST_LOSSES, _losses, dict[int, float]())
    choices = stored.choices()
    recorded = {key: dict(store.history(run_id, key)) for key in LOSSES}
    if not recorded["train/loss"]:
        raise ConfigError(f"run {run_id}: no epoch of it is recorded; {stored.explain_status()}")
    with _place() as place:
        config = saved.config_of(store, run_id, place)
        diff = _text(store.fetch(run_id, DIFF, place)) if store.has(run_id, DIFF) else ""
        changed = stored.tags.get("config_hash") not in (None, identity(config))
        _as_recorded(config, stored, threads, device, root)
        if keep is not None:
            check_store(keep, config.tracking.experiment, option="--keep")
            config.tracking.tags = {**config.tracking.tags, "reproduces": run_id}
        try:
            job = _job(config, choices, keep, place)
        except ConfigError as error:
            said = _refusal(str(error), threads, device)
            raise ConfigError(f"run {run_id} cannot be trained here, {said}") from error
        folder = Path(job.composed.hydra.run.dir)
        outcome = _train(job, folder, reporter, recorded, kept=keep is not None)
        story = RunHistory.of(folder)
        agreements = [
            agreement(STEPS, steps, _losses(story.tags.get(FIRST_LOSSES, "[]"))),
            *(agreement(key, recorded[key], story.metrics.get(key, {})) for key in LOSSES),
        ]
        differences = [CHANGED] if changed else []
        if isinstance(outcome, Exception) and not isinstance(outcome, _Compared):
            differences.insert(0, f"the second run failed: {reason_of(outcome)}")
        if not steps:
            differences.append(UNKNOWN)
        differences += _differences(stored, job, story.tags, diff, _text(folder / DIFF))
    return Reproduction(
        run_id,
        stored.name,
        [each for each in agreements if each.compared],
        differences,
        same_config=not changed,
        kept=folder if keep is not None else None,
        store=job.store_uri,
        kept_id=run.name_of(folder) if keep is not None else "",
        delivered=UploadState.of(folder, job.store_uri).ended,
    )


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A temporary folder. What a process that was killed has left is removed by the next one."""
    for owner in Path(gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # another user's
            if is_running(json.loads(owner.read_text())) is False:
                shutil.rmtree(owner.parent)
    with TemporaryDirectory(prefix=PREFIX) as folder:
        Path(folder, OWNER).write_text(json.dumps(process_identity()))
        yield Path(folder)


def _refusal(error: str, threads: int | None, device: str | None) -> str:
    """Why a run cannot be trained again, and as what: what was typed, if anything was."""
    typed = [f"--threads {threads}"] * (threads is not None)
    typed += [f"--device {device}"] * (device is not None)
    hint = ". To choose another device: --device cpu" * error.startswith("training.device=")
    return f"{' and '.join(typed) or 'as its record says'}: {error}{hint}"


def _train(
    job: Job,
    folder: Path,
    reporter: Reporter,
    recorded: Mapping[str, Mapping[int, float]],
    *,
    kept: bool,
) -> Result | Exception:
    """What the second run has come to, which goes as far as the first one has recorded."""
    last, finished = max(recorded["train/loss"]), bool(recorded["test/loss"])
    if last < job.config.training.epochs:
        reporter = _Until(reporter, last)
    if not kept:
        return run.execute([job], [folder], reporter, finished=finished)[0]
    try:
        return run.conduct(job, folder, reporter, finished=finished)
    except ConfigError:  # nothing was trained
        raise
    except Exception as error:  # a model can raise anything
        return error


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


def _losses(text: str) -> dict[int, float]:
    """By their step."""
    return dict(enumerate(map(float, json.loads(text)), start=1))


def _as_recorded(
    config: DictConfig,
    stored: StoredRun,
    threads: int | None,
    device: str | None,
    root: str | None,
) -> None:
    """What the config leaves to the machine, as it was, but for what is asked for."""
    tags = stored.tags
    if root is not None:
        config.dataset.root = root
    before = stored.parsed_tag("threads", int, config.training.threads)
    config.training.threads = before if threads is None else threads
    if device is not None or "device" in tags:
        config.training.device = tags["device"] if device is None else device
    if "compiled" in tags:
        config.training.compile = "always" if tags["compiled"] == "true" else "never"


def _job(
    config: DictConfig, choices: Mapping[str, str | None], keep: str | None, place: Path
) -> Job:
    """The run, ready to be trained: within `place`, or in the usual one if it is to be kept."""
    composed = config.copy()
    with open_dict(composed):
        composed.hydra = compose([]).hydra
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.runtime.choices = choices
        # as it is now: it says the time
        composed.hydra.run.dir = str(composed.hydra.run.dir if keep else place / "run")
    job = prepare(composed)
    return replace(job, store_uri=keep) if keep else replace(job, open_runs=open_runs_at(place))


def _differences(
    stored: StoredRun, job: Job, tags: Mapping[str, str], diff: str, diff_now: str
) -> list[str]:
    """What is not as it was, of what numbers can depend on."""
    was = stored.tags
    said = []
    before, now = stored.dataset_digest, job.load(job.config.dataset).digest
    if before not in ("", now):
        said.append(f"data: SHA-256 {before[:12]}..., now {now[:12]}...")
    commit = "mlflow.source.git.commit"
    if was.get(commit) != tags.get(commit):
        said.append(f"code: commit {was.get(commit, '?')[:8]}, now {tags.get(commit, '?')[:8]}")
    elif diff != diff_now:
        said.append("code: the uncommitted changes (uncommitted.diff)")
    for tag, name in TAGS.items():
        if tag in was and was[tag] != tags.get(tag):
            said.append(f"{name}: {was[tag]}, now {tags.get(tag, '?')}")
    return said


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
