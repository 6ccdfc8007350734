"""The jobs of a sweep before they run, and the files of the sweep's folder that list them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mnist_exp.config.hydra_adapter import make_paths_absolute
from mnist_exp.config.schema import SweepConfig
from mnist_exp.errors import ConfigError
from mnist_exp.system import files

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong override is refused before
    from mnist_exp.run.job import Job

MANIFEST = "sweep.json"  # all jobs, those included that have no run; on the parent run as well
CONFIGS = "frozen.json"  # what is needed to run the jobs: the sweep is resumed from it


@dataclass
class SweepJob:
    """One job of a sweep before it runs."""

    number: int
    overrides: Sequence[str]  # as Hydra gives them to a launcher
    values: Mapping[str, str]  # swept key -> value as it was typed: {"optimizer.lr": "0.1"}
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))  # Hydra's part as well
    checked: "Job | None" = None  # what its run needs, checked by building it
    folder: Path = Path()  # of its output, once the sweep has one
    problem: str = ""  # why it cannot be run

    @property
    def run(self) -> "Job":
        """All that the run of a job needs, once the job has been checked."""
        assert self.checked is not None, self.problem
        return self.checked

    def describe(self) -> str:
        """Return the job's name in messages: "job 3 (optimizer.lr=0.1 seed=0)"."""
        return f"job {self.number} ({' '.join(f'{k}={v}' for k, v in self.values.items())})"


def swept_values(jobs: Iterable[SweepJob]) -> dict[str, list[str]]:
    """Return the values of each key that is swept, in their order."""
    values: dict[str, dict[str, None]] = {}
    for job in jobs:
        for key, value in job.values.items():
            values.setdefault(key, {})[value] = None
    return {key: list(each) for key, each in values.items()}


@dataclass
class Manifest:
    """The list of a sweep's jobs, as it is kept in the sweep's folder and on its parent run."""

    launcher: str
    settings: Mapping[str, Any]  # the sweep's part of the config
    jobs: Sequence[SweepJob]  # those that can be run, by their number; then the others
    stacks: Sequence[Sequence[int]] | None = None  # which jobs are trained together
    # number -> status and reason, once the sweep has ended: a job that was not run has no record
    ended: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def valid(self) -> list[SweepJob]:
        """The jobs that can be run."""
        return [job for job in self.jobs if not job.problem]

    @property
    def sweep_config(self) -> SweepConfig:
        """The settings, which an earlier version may have written."""
        return SweepConfig.from_record(self.settings)

    def save(self, folder: Path) -> None:
        """Write the list to a folder; without the configs, which only `save_configs` writes."""
        jobs = []
        for job in self.jobs:
            entry = {"values": job.values, "problem": job.problem, "folder": str(job.folder)}
            if job.number in self.ended:
                entry["status"], entry["reason"] = self.ended[job.number]
            jobs.append(entry)
        others = {"launcher": self.launcher, "settings": self.settings, "stacks": self.stacks}
        files.write(folder / MANIFEST, json.dumps({**others, "jobs": jobs}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Return the list that a folder holds. Raise ConfigError if it is missing or damaged."""
        try:
            saved = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            jobs, ended = [], {}
            for number, entry in enumerate(saved.pop("jobs")):
                path, problem = Path(entry["folder"]), entry["problem"]
                jobs.append(SweepJob(number, [], entry["values"], folder=path, problem=problem))
                if "status" in entry:
                    ended[number] = entry["status"], entry["reason"]
            return cls(**saved, jobs=jobs, ended=ended)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{folder / MANIFEST}: cannot be read: {error}") from error

    def save_configs(self, folder: Path) -> None:
        """Write all that is needed to run the jobs later, whatever files have changed by then."""
        jobs = [
            {
                "number": job.number,
                "words": job.overrides,
                "values": job.values,
                "folder": str(job.folder),
                "config": OmegaConf.to_container(job.config, enum_to_str=True),
            }
            for job in self.valid
        ]
        files.write(folder / CONFIGS, json.dumps(jobs))

    @staticmethod
    def load_configs(folder: Path) -> list[SweepJob]:
        """Return the jobs that `save_configs` wrote. Raise ConfigError if that cannot be read."""
        try:
            saved = json.loads((folder / CONFIGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder / CONFIGS}: cannot be read ({error}), so the sweep cannot be resumed"
            ) from error
        jobs = []
        for job in saved:
            config = DictConfig(job["config"])
            make_paths_absolute(config)  # which an earlier version did not write
            place = Path(job["folder"])
            jobs.append(SweepJob(job["number"], job["words"], job["values"], config, folder=place))
        return jobs
