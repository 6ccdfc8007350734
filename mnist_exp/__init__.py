"""Image classification experiments on MNIST and its family, configured with Hydra."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from mnist_exp._version import __version__ as __version__
from mnist_exp.api import (
    build,
    compare,
    ensemble,
    evaluate,
    export,
    gc,
    history,
    load,
    note,
    predict,
    predictions_figure,
    report,
    reproduce,
    resume,
    rm,
    runs,
    save_figure,
    show,
    status,
    stop,
    sync,
    tag,
    train,
    train_sweep,
)

# Threads that wait spin for milliseconds by default. Where another process wants the core as well,
# that made training ten times slower; a hundredth of it is as fast where the machine is free.
# Read when torch loads its OpenMP library, so it has to be said before.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__all__ = [
    "build",
    "compare",
    "ensemble",
    "evaluate",
    "export",
    "gc",
    "history",
    "load",
    "note",
    "predict",
    "predictions_figure",
    "report",
    "reproduce",
    "resume",
    "rm",
    "runs",
    "save_figure",
    "show",
    "status",
    "stop",
    "sync",
    "tag",
    "train",
    "train_sweep",
]

# Modules that configs and pickled models of before 0.1.0 name: where what was in them is now, and
# what has another name there.
_MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "mnist_exp.models": ("mnist_exp.training.models", {"Served": "DeployedModel"}),
    "mnist_exp.optim": ("mnist_exp.training.schedules", {}),
}


class _MovedModule(ModuleType):
    """A module under its old name, which looks up its attributes where they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # who looks through all modules must not import torch
            raise AttributeError(name)
        module, renamed = _MOVED[self.__name__]
        return getattr(importlib.import_module(module), renamed.get(name, name))


sys.modules.update({name: _MovedModule(name) for name in _MOVED})
