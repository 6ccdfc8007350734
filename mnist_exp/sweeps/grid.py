"""Every combination of what is swept, composed. Needs no torch: a typo is refused at once."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Sweep
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from mnist_exp.config.explain import explain
from mnist_exp.config.hydra_adapter import (
    COMPOSITION_ERRORS,
    combinations,
    make_paths_absolute,
    set_overrides,
    typed_overrides,
)
from mnist_exp.config.names import short_names
from mnist_exp.config.schema import SweepConfig, task_config
from mnist_exp.config.validate import validate, validate_sweep
from mnist_exp.errors import ConfigError
from mnist_exp.formatting import count_of
from mnist_exp.run.console import Reporter
from mnist_exp.sweeps.manifest import SweepJob, swept_values

CHECK_SECONDS = 0.035  # that a job takes to be composed, validated and built


def jobs(context: HydraContext, master: DictConfig, reporter: Reporter) -> list[SweepJob]:
    """Return the jobs of a sweep, composed once and for all; each notes why it cannot be run.

    Args:
        context: What Hydra's launchers need.
        master: The config that the jobs have in common, with the overrides in `hydra.overrides`.
        reporter: Shows what the jobs are before they are composed.

    Raises:
        ConfigError: Nothing is swept, or a job cannot be run.
    """
    settings = validate_sweep(master)
    if not master.hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError("hydra/sweeper: only basic works here, which tries every combination")
    params = _params(master)
    for key, value in params.items():
        if isinstance(value, list):
            raise ConfigError(
                f"hydra.sweeper.params.{key}={value}: a list is one value. Several are a "
                f"text: {key}: {','.join(map(str, value))}"
            )
    words = [*(f"{key}={value}" for key, value in params.items()), *typed_overrides(master)]
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides(words)
    _check_unique(overrides[len(params) :])
    jobs = expand(overrides, settings)
    seconds = CHECK_SECONDS * len(jobs)
    if seconds > 5:
        wait = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        reporter.notice(f"checking {len(jobs):,} jobs before the first one starts: about {wait}")
    reporter.announce(f"{_describe(jobs)}: checking them ...")
    for job in compose(context.config_loader, master, overrides, jobs):
        if not job.problem:
            with open_dict(job.config):
                job.config.hydra.job.num = job.config.hydra.job.id = job.number
            try:
                _validate(job.config, params)
            except ConfigError as error:
                job.problem = str(error)
        raise_if_invalid(job, settings)
    reporter.announce(f"{_describe(jobs)}: loading torch ...")  # which takes seconds
    return jobs


def _params(config: DictConfig) -> dict[str, Any]:
    """Return `hydra.sweeper.params`, its interpolations as they are: jobs have their own values."""
    params = OmegaConf.to_container(OmegaConf.create(config.hydra.sweeper.params or {}))
    assert isinstance(params, dict)
    return {str(key): value for key, value in params.items()}


def _describe(jobs: Sequence[SweepJob]) -> str:
    """Return how many jobs there are, and what is swept: "4 jobs, lr=0.1,0.2 x seed=0,1"."""
    values = swept_values(jobs)
    names = short_names(values)
    shown = {key: v if len(v) <= 8 else [*v[:3], "...", v[-1]] for key, v in values.items()}
    swept = " x ".join(f"{names[key]}={','.join(texts)}" for key, texts in shown.items())
    return f"{count_of(len(jobs), 'job')}, {swept}"


def _check_unique(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for a key that is swept twice; a recipe's may be swept otherwise."""
    swept: dict[str, Override] = {}
    for override in filter(Override.is_sweep_override, overrides):
        first = swept.setdefault(override.get_key_element(), override)
        if first is not override:
            raise ConfigError(
                f"{first.input_line} {override.input_line}: it is swept twice. Give all of its "
                f"values at once"
            )


def _validate(config: DictConfig, params: Mapping[str, Any]) -> None:
    """Raise ConfigError if the composed config of a job is wrong, or sweeps something itself."""
    own_params = _params(config)
    if own_params != params:
        raise ConfigError(
            f"{' '.join(f'{key}={value}' for key, value in own_params.items())}: this recipe is a "
            f"sweep of its own, which cannot be a job of another"
        )
    validate(task_config(config))


def raise_if_invalid(job: SweepJob, settings: SweepConfig) -> None:
    """Raise ConfigError for a job that cannot be run, unless those are to be skipped."""
    if job.problem and not settings.skip_invalid:
        raise ConfigError(
            f"{job.describe()}: {job.problem}\n"
            f"Nothing was started. To leave such jobs out: sweep.skip_invalid=true"
        )


def expand(overrides: Sequence[Override], settings: SweepConfig) -> list[SweepJob]:
    """Return every combination of what is swept, as jobs that are not composed yet.

    Raise ConfigError if there is none, or there are too many.
    """
    swept = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
    if not swept:
        raise ConfigError(
            "nothing is swept. Give a key several values, as in optimizer.lr=0.01,0.1, or leave "
            "out -m"
        )
    total = 1
    for key, override in swept.items():
        if not _is_list_of_values(override):
            raise ConfigError(f"{override.input_line}: give the values, as in {key}=0.01,0.1")
        count = 0
        for _ in override.sweep_iterator():
            count += 1
            if total * count > settings.max_jobs:
                raise ConfigError(
                    f"{' '.join(o.input_line or '' for o in swept.values())}: more than "
                    f"{settings.max_jobs:,} jobs. If they are meant: sweep.max_jobs=N"
                )
        if count == 0:
            raise ConfigError(f"{override.input_line}: no values, so there is no job")
        total *= count
    jobs = []
    for number, words in enumerate(combinations(overrides)):
        pairs = [word.split("=", 1) for word in words]
        values = {key.lstrip("+"): value for key, value in pairs if key in swept}
        jobs.append(SweepJob(number, words, values))
    return jobs


def _is_list_of_values(override: Override) -> bool:
    """Return whether what is swept can be counted; where an interval is among it, it cannot."""
    value = override.value()
    among = value.list if isinstance(value, ChoiceSweep) else []
    return override.is_discrete_sweep() and not any(isinstance(each, Sweep) for each in among)


def compose(
    loader: ConfigLoader,
    master: DictConfig,
    overrides: Sequence[Override],
    jobs: Sequence[SweepJob],
) -> Iterator[SweepJob]:
    """Compose the config of each job, and yield the jobs, one after the other.

    Hydra takes 0.1 s for each. Jobs that differ only in values of keys that are there already are
    set in a copy of the first of them.

    Args:
        loader: Hydra's loader of configs.
        master: The config that the jobs have in common.
        overrides: All overrides of the sweep.
        jobs: What `expand` has made of them.
    """
    groups = {str(group) for group in OmegaConf.select(master, "hydra.runtime.choices")}
    plain = {
        o.get_key_element()
        for o in overrides
        if o.is_sweep_override() and o.key_or_group not in groups
        and not (o.is_add() or o.is_force_add() or o.is_delete() or o.package)
        and not o.key_or_group.startswith("hydra")
    }  # fmt: skip
    parser = OverridesParser.create(config_loader=loader)
    composed: dict[tuple[str, ...], DictConfig] = {}  # by the overrides that are not plain
    for job in jobs:
        words = list(job.overrides)
        others = tuple(word for word in words if word.split("=", 1)[0] not in plain)
        try:
            if others not in composed:
                composed[others] = loader.load_sweep_config(master, words)
            job.config = copy.deepcopy(composed[others])
            parsed = parser.parse_overrides(words)
            for override in parsed:
                if override.get_key_element() in plain:
                    OmegaConf.update(job.config, override.key_or_group, override.value())
            set_overrides(job.config, parsed)
            make_paths_absolute(job.config)
        except COMPOSITION_ERRORS as error:
            job.problem = str(explain(error, words))
        yield job
