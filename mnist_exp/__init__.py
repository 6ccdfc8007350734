"""Image classification experiments on MNIST and its family, configured with Hydra."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["train"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and most of the package can do without
    if name == "train":
        from mnist_exp.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
