"""What Hydra finds of this project among its plugins: the launcher `stacked`.

Hydra imports this module whenever it starts, so the work is elsewhere: in
mnist_exp/sweeps/launcher.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class StackedConfig:
    _target_: str = "hydra_plugins.mnist_exp_sweep.StackedLauncher"
    max_stack: int | None = None  # models trained together; None: what is fastest on the device


ConfigStore.instance().store(
    group="hydra/launcher", name="stacked", node=StackedConfig, provider="mnist_exp"
)


class StackedLauncher(Launcher):
    """Trains the jobs that can share a stack together."""

    def __init__(self, max_stack: int | None = None) -> None:
        self.max_stack = max_stack

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.task = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from mnist_exp.sweeps import launcher as stacked

        return stacked.launch(self.task, self.max_stack)
