"""Precision: the type in which a model computes; its parameters are float32 in any case."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the name in a config


@contextlib.contextmanager
def computing_in(precision: torch.dtype, device: torch.device, stacked: bool) -> Iterator[None]:
    """Enter a context in which convolutions and linear layers compute in a precision.

    Micikevicius et al., "Mixed Precision Training" (2018), by `torch.autocast`. bfloat16 has the
    range of float32, so that gradients need no scaling (Kalamkar et al. 2019).

    Args:
        precision: torch.float32, with which nothing is done, or torch.bfloat16.
        device: The device of what is computed.
        stacked: Whether several models compute at once, by vmap.
    """
    if precision == torch.float32:
        yield
        return
    norms = _Float32Norms() if stacked else contextlib.nullcontext()
    with torch.autocast(device.type, precision), norms:
        yield


class _Float32Norms(TorchFunctionMode):
    """A context in which norms with running statistics compute in float32.

    Under vmap, batch_norm needs an input of the type of its statistics.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (F.batch_norm, F.instance_norm):
            x, *others = args
            return func(x.float(), *others, **(kwargs or {})).to(x.dtype)
        return func(*args, **(kwargs or {}))


def slow_precision(precision: torch.dtype, device: torch.device) -> str:
    """Return a warning if a device computes in bfloat16 what it has no instructions for, or "".

    Measured on a CPU with AVX-512, but not its bfloat16, on one thread, forward and backward: cnn
    takes 1.7 times as long as in float32 and mlp 3 times; convolutions in torch's usual memory
    layout, which those of people's own modules have, take 6 to 10 times as long.
    """
    if precision != torch.bfloat16 or device.type != "cpu" or _has_bfloat16():
        return ""
    return (
        "training.precision=bfloat16: this CPU has no instructions for it, and a step takes "
        "2 to 10 times as long as with training.precision=float32"
    )


def _has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16: AVX-512's, AMX's, or ARM's."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch cannot tell
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(bool(value) for name, value in capabilities.items() if "bf16" in name)
