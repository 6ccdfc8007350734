"""K models of one architecture as one: parameters and buffers `[K, ...]`.

The module is a skeleton: `torch.func` calls it with tensors that it does not own. A stack of one
runs without vmap, so a single run pays nothing for being a stack.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.overrides import TorchFunctionMode

Tensors = dict[str, Tensor]


class Stack:
    """K models, each initialised from its own seed as `torch.manual_seed(seed); build()` would.

    `params` (trainable) and `buffers` (the rest) map a parameter's name to `[K, ...]`.
    """

    def __init__(
        self, build: Callable[[], nn.Module], seeds: Sequence[int], device: torch.device
    ) -> None:
        modules = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours
                torch.default_generator.manual_seed(seed)
                modules.append(build())
        self.size = len(modules)
        self.device = device
        self.module = modules[0].to(device).train()
        trainable = {n for n, p in self.module.named_parameters() if p.requires_grad}

        def stacked(name: str) -> Tensor:
            return torch.stack([_tensor(m, name).detach() for m in modules]).to(device)

        names = [n for n, _ in self.module.named_parameters()]
        self.params: Tensors = {n: stacked(n) for n in names if n in trainable}
        others = [n for n in names if n not in trainable]
        others += [n for n, _ in self.module.named_buffers()]
        self.buffers: Tensors = {n: stacked(n) for n in others}
        self.noisy = any(_may_draw(m) for m in self.module.modules())
        # a trace freezes what Python decides in forward(), which modules of one's own may do
        self.traceable = all(_is_known(m) for m in self.module.modules())
        # on a CPU, convolutions of several models at once are slower than one after the other
        self.convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in self.module.modules())

    def take(self, rows: Sequence[int]) -> "Stack":
        """A stack of some of the models, copied as they are now."""
        taken = copy.copy(self)
        taken.size = len(rows)
        index = torch.tensor(rows, device=self.device)
        taken.params = {n: t[index] for n, t in self.params.items()}
        taken.buffers = {n: t[index] for n, t in self.buffers.items()}
        return taken

    def gradients(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        keys: Tensor,
        smooth: Tensor | None,
    ) -> tuple[Tensors, Tensors, Tensor, Tensor]:
        """One batch forward and backward, in training mode.

        x: [K, B, C, H, W] float; y: [K, B] (or [1, ...]: the same for all models); keys: int64 [K],
        of this step's dropout masks; smooth: [K], label smoothing, or None for none. Returns
        gradients [K, ...], new buffers [K, ...], the mean loss [K] and the number of correct
        predictions [K].
        """
        if self.size > 1:
            each = 0 if len(x) == self.size else None
            x, y = (x, y) if each == 0 else (x[0], y[0])
            f = vmap(
                grad_and_value(self._loss, has_aux=True),
                in_dims=(0, 0, each, each, 0, None if smooth is None else 0),
                randomness="different",
            )
            grads, (loss, (new, correct)) = f(params, buffers, x, y, keys, smooth)
            return grads, new, loss, correct
        # torch.func.grad costs three times plain autograd where nothing is compiled
        leaves = {n: p[0].detach().requires_grad_() for n, p in params.items()}
        one = {n: b[0] for n, b in buffers.items()}
        smooth = None if smooth is None else smooth[0]
        loss, (new, correct) = self._loss(leaves, one, x[0], y[0], keys[0], smooth)
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        grads = {n: g[None] for n, g in zip(leaves, found, strict=True)}
        return grads, {n: b[None] for n, b in new.items()}, loss.detach()[None], correct[None]

    def _loss(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        keys: Tensor,
        smooth: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensors, Tensor]]:
        # modules write to their buffers (BatchNorm): they get copies, and what is there in the end,
        # written to or assigned, is handed back
        tensors = {**params, **{n: b.clone() for n, b in buffers.items()}}
        logits = self._call(tensors, x, keys if self.noisy else None)
        buffers = {n: tensors[n].detach() for n in buffers}
        loss = F.cross_entropy(logits, y)
        if smooth is not None:
            uniform = -F.log_softmax(logits, -1).mean()  # the cross-entropy with all classes alike
            loss = torch.lerp(loss, uniform, smooth)
        return loss, (buffers, (logits.argmax(-1) == y).sum())

    def _call(self, tensors: Tensors, x: Tensor, keys: Tensor | None = None) -> Tensor:
        logits: Tensor
        with nullcontext() if keys is None else _Noise(keys):
            logits = functional_call(self.module, tensors, (x,))
        return logits

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """In evaluation mode, the same images for every model. [B, C, H, W] -> [K, B, classes]."""
        self.module.eval()
        try:
            if self.size == 1:
                return self._call({n: t[0] for n, t in self._all().items()}, x)[None]
            return vmap(self._call, in_dims=(0, None))(self._all(), x)
        finally:
            self.module.train()

    def _all(self) -> Tensors:
        return {**self.params, **self.buffers}

    def snapshot(self) -> Tensors:
        """A copy of all parameters and buffers, [K, ...] each."""
        return {n: t.clone() for n, t in self._all().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes parameters and buffers [K, ...] from a snapshot."""
        for own in (self.params, self.buffers):
            own.update({n: tensors[n].to(self.device, copy=True) for n in own})

    def model(self, k: int) -> nn.Module:
        """Model `k` as a plain module on the CPU that owns its tensors, in evaluation mode."""
        state = {n: t[k].cpu() for n, t in self._all().items()}
        return _with_tensors(self.module, state).eval()


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _with_tensors(module: nn.Module, tensors: Tensors) -> nn.Module:
    module = copy.deepcopy(module).cpu()
    for name, tensor in tensors.items():
        _tensor(module, name).data = tensor.clone()
    return module


def _may_draw(module: nn.Module) -> bool:
    return isinstance(module, _RANDOM) or not _is_known(module)


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "mnist_exp."))


class _Noise(TorchFunctionMode):
    """Dropout whose mask is a function of (key, call, position) alone.

    torch draws the masks of a whole stack from one generator, so a run would depend on the runs
    beside it. Here a run's key, a number a step, decides; under vmap the key is batched. Bits come
    from MurmurHash3's 32-bit finaliser (Appleby 2011), in int64 as torch has no unsigned shifts.
    Other random functions are left to torch's generator, which is seeded from the keys: a run alone
    is reproducible, but in a stack it differs from itself alone.
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            return self._drop(_DROPOUTS[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _drop(
        self, rank: int, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        if p == 1:
            return input * 0
        self.calls += 1
        # whole channels: the mask is [N, C, 1, ...], or [C, 1, ...] where torch reads the input as
        # one example; to dropout2d three dimensions are [N, C, L]
        one = rank in (1, 3) and input.dim() < rank + 2
        own = input.dim() if rank == 0 else 2 - one
        shape = input.shape[:own] + (1,) * (input.dim() - own)
        count = 1
        for size in shape:
            count *= size
        bits = torch.arange(count, device=input.device).view(shape)
        bits = self.key + self.calls * 0x9E3779B9 + bits * 0x85EBCA77
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = bits & 0xFFFFFFFF
            bits = (bits ^ (bits >> shift)) * factor
        bits = bits & 0xFFFFFFFF
        keep = (bits ^ (bits >> 16)) >= int(p * 2**32)
        return input * keep / (1 - p)


# of torch.nn, what may draw random numbers in training
_RANDOM = (
    nn.modules.dropout._DropoutNd,
    nn.FractionalMaxPool2d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
)
# function -> how many dimensions a channel has, which share one mask value
_DROPOUTS = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
