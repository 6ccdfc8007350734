"""Dropout whose mask is a function of (key, call, position) alone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mnist_exp.random_bits import counter_bits

# function -> the number of dimensions of a channel, whose values are kept or dropped together
_CHANNEL_DIMENSIONS = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}


class SeededDropout(TorchFunctionMode):
    """A context in which the dropout functions of torch draw their masks from a key.

    torch draws the masks of a whole stack from one generator, so a run would depend on the runs
    beside it. Here a run's key, one number for each step, decides; under vmap the key is batched.
    Other random functions are left to torch's generator, which is seeded from the keys: a run alone
    is reproducible, but in a stack it differs from itself alone.
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key  # int64, without dimensions
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _CHANNEL_DIMENSIONS:
            return self._drop(_CHANNEL_DIMENSIONS[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _drop(
        self, rank: int, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Return `input` after dropout; all but `rank` have the meaning that torch gives them."""
        if not training or p == 0:
            return input
        if p == 1:
            return input * 0
        self.calls += 1
        # Whole channels: the mask is [N, C, 1, ...], or [C, 1, ...] where torch reads the input as
        # one example. To dropout2d three dimensions are [N, C, L].
        is_one_example = rank in (1, 3) and input.dim() < rank + 2
        kept_dims = input.dim() if rank == 0 else 2 - is_one_example
        shape = input.shape[:kept_dims] + (1,) * (input.dim() - kept_dims)
        bits = torch.arange(math.prod(shape), device=input.device).view(shape)
        keep = counter_bits(self.key + self.calls * 0x9E3779B9, bits) >= int(p * 2**32)
        return input * keep / (1 - p)
