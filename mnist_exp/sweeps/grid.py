"""Every combination of what is swept, composed. Needs no torch: a typo is refused at once."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from mnist_exp.config.explain import explain
from mnist_exp.config.hydra_adapter import COMPOSITION_ERRORS
from mnist_exp.config.schema import SweepConfig, task_config
from mnist_exp.config.validate import validate, validate_sweep
from mnist_exp.errors import ConfigError
from mnist_exp.system import files

FROZEN = "frozen.json"
CHECK_SECONDS = 0.035  # that a job takes to be composed, validated and built


@dataclass
class Planned:
    """One job of a sweep before it runs."""

    number: int
    words: list[str]  # its overrides, as Hydra gives them to a launcher
    values: dict[str, str]  # what was swept
    composed: DictConfig | None = None
    job: Any = None  # built and checked
    folder: Path = Path()  # of its output, once the sweep has one
    problem: str = ""  # why it cannot be run

    @property
    def said(self) -> str:
        """For people: "job 3 (optimizer.lr=0.1 seed=0)"."""
        return f"job {self.number} ({' '.join(f'{k}={v}' for k, v in self.values.items())})"


def jobs(
    context: HydraContext, master: DictConfig, say: Callable[[str], None] = lambda text: None
) -> list[Planned]:
    """The jobs of a sweep, composed once and for all; a problem in one of them is noted there.

    `master`: what they have in common, with what was typed in `hydra.overrides`. `say`: is told of
    a wait. Raises ConfigError where there is no sweep to speak of.
    """
    settings = validate_sweep(master)
    if not master.hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError("hydra/sweeper: only basic works here, which tries every combination")
    params = master.hydra.sweeper.params or {}
    for key, value in params.items():
        if OmegaConf.is_list(value):
            raise ConfigError(
                f"hydra.sweeper.params.{key}={list(value)}: a list is one value. Several are a "
                f"text: {key}: {','.join(map(str, value))}"
            )
    words = [*(f"{key}={value}" for key, value in params.items()), *master.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=context.config_loader)
    overrides = parser.parse_overrides(words)
    _check_unique(overrides[len(params) :])
    planned = expand(overrides, settings)
    seconds = CHECK_SECONDS * len(planned)
    if seconds > 5:
        wait = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        say(f"checking {len(planned):,} jobs before the first one starts: about {wait}")
    for p in compose(context.config_loader, master, overrides, planned):
        if p.composed is not None:
            with open_dict(p.composed):
                p.composed.hydra.job.num = p.composed.hydra.job.id = p.number
            try:
                _validate(p.composed, params)
            except ConfigError as error:
                p.problem = str(error)
        refuse(p, settings)
    return planned


def _check_unique(typed: Sequence[Override]) -> None:
    """Raises ConfigError for a key that is swept twice; a recipe's may be swept otherwise."""
    swept: dict[str, Override] = {}
    for o in typed:
        if o.is_sweep_override() and swept.setdefault(o.get_key_element(), o) is not o:
            raise ConfigError(
                f"{swept[o.get_key_element()].input_line} {o.input_line}: it is swept twice. Give "
                f"all of its values at once"
            )


def _validate(composed: DictConfig, params: Mapping[str, Any]) -> None:
    own = composed.hydra.sweeper.params or {}
    if own != params:
        raise ConfigError(
            f"{' '.join(f'{key}={value}' for key, value in own.items())}: this recipe is a sweep "
            f"of its own, which cannot be a job of another"
        )
    validate(task_config(composed))


def refuse(planned: Planned, settings: SweepConfig) -> None:
    """Raises ConfigError for a job that cannot be run, unless those are to be skipped."""
    if planned.problem and not settings.skip_invalid:
        raise ConfigError(
            f"{planned.said}: {planned.problem}\n"
            f"Nothing was started. To leave such jobs out: sweep.skip_invalid=true"
        )


def expand(overrides: Sequence[Override], settings: SweepConfig) -> list[Planned]:
    """Every combination of what is swept. Raises ConfigError for none, and for far too many."""
    swept = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
    if not swept:
        raise ConfigError(
            "nothing is swept. Give a key several values, as in optimizer.lr=0.01,0.1, or leave "
            "out -m"
        )
    number = 1
    for key, override in swept.items():
        if not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: give the values, as in {key}=0.01,0.1")
        here = 0
        for _ in override.sweep_iterator():
            here += 1
            if number * here > settings.max_jobs:
                raise ConfigError(
                    f"{' '.join(o.input_line or '' for o in swept.values())}: more than "
                    f"{settings.max_jobs:,} jobs. If they are meant: sweep.max_jobs=N"
                )
        if here == 0:
            raise ConfigError(f"{override.input_line}: no values, so there is no job")
        number *= here
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    planned = []
    for number, words in enumerate(jobs):
        pairs = [word.split("=", 1) for word in words]
        values = {key.lstrip("+"): value for key, value in pairs if key in swept}
        planned.append(Planned(number, words, values))
    return planned


def compose(
    loader: ConfigLoader,
    master: DictConfig,
    overrides: Sequence[Override],
    planned: Sequence[Planned],
) -> Iterator[Planned]:
    """Composes each job's config, once and for all. The jobs, one after the other.

    Hydra takes 0.1 s for each. Jobs that differ only in values of keys that are there already are
    set in a copy of the first of them.
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
    made: dict[tuple[str, ...], DictConfig] = {}
    for p in planned:
        rest = tuple(word for word in p.words if word.split("=", 1)[0] not in plain)
        try:
            if rest not in made:
                made[rest] = loader.load_sweep_config(master, list(p.words))
                p.composed = copy.deepcopy(made[rest])
            else:
                p.composed = copy.deepcopy(made[rest])
                parsed = parser.parse_overrides(list(p.words))
                for override in parsed:
                    if override.get_key_element() in plain:
                        OmegaConf.update(p.composed, override.key_or_group, override.value())
                _set_overrides(p.composed, parsed)
        except COMPOSITION_ERRORS as error:
            p.problem = str(explain(error, p.words))
        yield p


def _set_overrides(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """What Hydra's own part says of the words that were typed."""
    own = [o for o in overrides if not o.is_hydra_override()]
    job = composed.hydra.job
    composed.hydra.overrides.task = [o.input_line for o in own]
    job.override_dirname = get_overrides_dirname(own, **job.config.override_dirname)


def freeze(planned: Sequence[Planned], folder: Path) -> None:
    """Writes the jobs of a sweep to its folder, as they are composed: to be resumed from there."""
    frozen = [
        {
            "number": p.number,
            "words": p.words,
            "values": p.values,
            "folder": str(p.folder),
            "config": OmegaConf.to_container(p.composed, enum_to_str=True),
        }
        for p in planned
    ]
    files.write(folder / FROZEN, json.dumps(frozen))


def thaw(folder: Path) -> list[Planned]:
    """The jobs of a sweep, as `freeze` has written them. Raises ConfigError."""
    try:
        frozen = json.loads((folder / FROZEN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder / FROZEN}: cannot be read ({error}), so the sweep cannot be resumed"
        ) from error
    planned = []
    for job in frozen:
        config = OmegaConf.create(job["config"])
        assert isinstance(config, DictConfig)
        planned.append(
            Planned(job["number"], job["words"], job["values"], config, folder=Path(job["folder"]))
        )
    return planned
