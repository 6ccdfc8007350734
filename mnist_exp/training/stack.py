"""K models of one architecture as one: parameters and buffers `[K, ...]`.

The module is a skeleton: `torch.func` calls it with tensors that it does not own. A stack of one
runs without vmap, so a single run pays nothing for being a stack.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from mnist_exp.training.dropout import SeededDropout

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
        self.is_stochastic = any(_is_stochastic(m) for m in self.module.modules())
        # a trace freezes what Python decides in forward(), which modules of one's own may do
        self.is_traceable = all(_is_known(m) for m in self.module.modules())
        # on a CPU, convolutions of several models at once are slower than one after the other
        self.has_convolutions = any(isinstance(m, _CONVOLUTIONS) for m in self.module.modules())

    def select(self, indices: Sequence[int]) -> "Stack":
        """A stack of some of the models, copied as they are now."""
        taken = copy.copy(self)
        taken.size = len(indices)
        index = torch.tensor(indices, device=self.device)
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
        logits = self._call(tensors, x, keys if self.is_stochastic else None)
        buffers = {n: tensors[n].detach() for n in buffers}
        loss = F.cross_entropy(logits, y)
        if smooth is not None:
            uniform = -F.log_softmax(logits, -1).mean()  # the cross-entropy with all classes alike
            loss = torch.lerp(loss, uniform, smooth)
        return loss, (buffers, (logits.argmax(-1) == y).sum())

    def _call(self, tensors: Tensors, x: Tensor, keys: Tensor | None = None) -> Tensor:
        logits: Tensor
        with nullcontext() if keys is None else SeededDropout(keys):
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


def _is_stochastic(module: nn.Module) -> bool:
    return isinstance(module, _STOCHASTIC) or not _is_known(module)


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "mnist_exp."))


# of torch.nn, what may draw random numbers in training
_STOCHASTIC = (
    *(
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ),
    nn.FractionalMaxPool2d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
)
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
