"""Image classification experiments on MNIST and its family, configured with Hydra."""

import os
from typing import Any

# Threads that wait spin for milliseconds by default. Where another process wants the core as well,
# that made training ten times slower; a hundredth of it is as fast where the machine is free.
# Read when torch loads its OpenMP library, so it has to be said before.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"
__all__ = [
    "build",
    "ensemble",
    "evaluate",
    "load",
    "predict",
    "reproduce",
    "train",
    "train_sweep",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and most of the package can do without
    if name in __all__:
        from mnist_exp import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
