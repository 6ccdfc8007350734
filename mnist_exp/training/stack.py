"""A stack: K models of one architecture as one, with parameters and buffers `[K, ...]`.

The module is a skeleton: `torch.func` calls it with tensors that it does not own. A stack of one
runs without vmap, so a single run pays nothing for being a stack.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mnist_exp.training.dropout import SeededDropout
from mnist_exp.training.precision import computing_in

Tensors = dict[str, Tensor]


class Batch(NamedTuple):
    """The input of one step for each model of a stack."""

    x: Tensor  # float images, [K, B, C, H, W], or [1, ...] if they are the same for all models
    y: Tensor  # labels, [K, B], or [1, B]
    keys: Tensor  # of the dropout masks, int64 [K]
    smoothing: Tensor | None  # of the labels, [K], or None for none
    others: Tensor | None = None  # the second labels of mixed images, like y; None for none
    shares: Tensor | None = None  # of the first labels, like y


# the mean loss, and with it the new buffers and the number of correct predictions
Loss = tuple[Tensor, tuple[Tensors, Tensor]]


class Stack:
    """K models, each initialised from its own seed as `torch.manual_seed(seed); build()` would.

    `params` (trainable) and `buffers` (the rest) map a parameter's name to `[K, ...]`. Their types
    are those that `build` gives them, whatever `precision` the models compute in.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seeds: Sequence[int],
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        modules = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours
                torch.default_generator.manual_seed(seed)
                modules.append(build())
        self.size = len(modules)
        self.device = device
        self.precision = precision
        # to make plain modules from: one that has been called may keep what cannot be copied
        self.unused_module = copy.deepcopy(modules[0]).eval()
        self.module = modules[0].to(device).train()
        submodules = list(self.module.modules())
        self.is_stochastic = any(isinstance(m, _STOCHASTIC) or not _is_known(m) for m in submodules)
        # a trace freezes what Python decides in forward(), which modules of one's own may do
        self.is_traceable = all(_is_known(m) for m in submodules)
        # on a CPU, convolutions of several models at once are slower than one after the other
        self.has_convolutions = any(isinstance(m, _CONVOLUTIONS) for m in submodules)
        trainable = {n for n, p in self.module.named_parameters() if p.requires_grad}

        def stacked(name: str) -> Tensor:
            tensors = torch.stack([_tensor(m, name).detach() for m in modules])
            return self.laid_out(tensors.to(device))

        names = [n for n, _ in self.module.named_parameters()]
        self.params: Tensors = {n: stacked(n) for n in names if n in trainable}
        others = [n for n in names if n not in trainable]
        others += [n for n, _ in self.module.named_buffers()]
        self.buffers: Tensors = {n: stacked(n) for n in others}

    def select(self, indices: Sequence[int]) -> "Stack":
        """Return a stack of some of the models, copied as they are now."""
        selected = copy.copy(self)
        selected.size = len(indices)
        index = torch.tensor(indices, device=self.device)
        selected.params = {n: selected.laid_out(t[index]) for n, t in self.params.items()}
        selected.buffers = {n: selected.laid_out(t[index]) for n, t in self.buffers.items()}
        return selected

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Stack":
        """Return a stack that has `tensors`, [K, ...] each, in place of its own of those names."""
        other = copy.copy(self)
        other.params = {n: tensors.get(n, p).to(p.dtype) for n, p in self.params.items()}
        other.buffers = {n: tensors.get(n, b).to(b.dtype) for n, b in self.buffers.items()}
        return other

    @property
    def is_channels_last(self) -> bool:
        """True where images and kernels are laid out with the channels of a pixel side by side.

        On a CPU, convolutions and the layers between them take 0.6 to 0.8 of the time in this
        layout. A stack of several does not use it, as vmap has none for them. Nor does a module
        that is not torch's or ours: it may call `x.view(len(x), -1)`, which needs the usual layout.
        Other devices were not measured.
        """
        is_alone_on_cpu = self.size == 1 and self.device.type == "cpu"
        return is_alone_on_cpu and self.has_convolutions and self.is_traceable

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the models [K, ...] in the memory layout that this stack computes in.

        What is computed from such tensors (gradients, an optimizer's state, copies) has it as well.
        """
        if self.is_channels_last and tensor.dim() == 5:  # [1, O, I, H, W]
            return tensor[0].to(memory_format=torch.channels_last)[None]
        return tensor

    def gradients(
        self, params: Tensors, buffers: Tensors, batch: Batch
    ) -> tuple[Tensors, Tensors, Tensor, Tensor]:
        """Do the forward and backward pass of one batch, in training mode.

        Args:
            params: The trainable parameters, [K, ...] each.
            buffers: All other tensors, [K, ...] each.
            batch: The batch of each model.

        Returns:
            Gradients [K, ...], new buffers [K, ...], the mean loss [K] and the number of correct
            predictions [K].
        """
        alone = self.size == 1  # without a leading dimension, which vmap would pay for
        leaves = {n: (p[0] if alone else p).detach().requires_grad_() for n, p in params.items()}
        loss, (new, correct) = (self._loss_alone if alone else self._losses)(leaves, buffers, batch)
        # torch.func.grad takes three times as long, and both it and gradients of several losses
        # import torch's compiler
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True)
        grads, loss = dict(zip(leaves, gradients, strict=True)), loss.detach()
        if not alone:
            return grads, new, loss, correct
        grads, new = ({n: t[None] for n, t in tensors.items()} for tensors in (grads, new))
        return grads, new, loss[None], correct[None]

    def _loss_alone(self, params: Tensors, buffers: Tensors, batch: Batch) -> Loss:
        """Return what `_loss` does for the only model, whose parameters are not stacked."""
        one = {n: b[0] for n, b in buffers.items()}
        smoothing = None if batch.smoothing is None else batch.smoothing[0]
        x, y, others, shares = _first(batch)
        return self._loss(params, one, x, y, batch.keys[0], smoothing, others, shares)

    def _losses(self, params: Tensors, buffers: Tensors, batch: Batch) -> Loss:
        """Return what `_loss` does for each model, [K, ...]."""
        each = None if len(batch.x) < self.size else 0
        if each is None:
            x, y, others, shares = _first(batch)
            batch = batch._replace(x=x, y=y, others=others, shares=shares)
        smoothed = None if batch.smoothing is None else 0
        mixed = None if batch.others is None else each
        in_dims = (0, 0, each, each, 0, smoothed, mixed, mixed)
        f = vmap(self._loss, in_dims=in_dims, randomness="different")
        result: Loss = f(params, buffers, *batch)
        return result

    def _loss(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        y: Tensor,
        keys: Tensor,
        smoothing: Tensor | None,
        others: Tensor | None,
        shares: Tensor | None,
    ) -> Loss:
        """Return the loss of one model, its new buffers, and its number of correct predictions."""
        # modules write to their buffers (BatchNorm): they get copies, and what is there in the end,
        # written to or assigned, is handed back
        tensors = {**params, **{n: b.clone() for n, b in buffers.items()}}
        logits = self._call(tensors, x, keys if self.is_stochastic else None)
        buffers = {n: tensors[n].detach() for n in buffers}
        loss = _cross_entropy(logits, y, smoothing, others, shares)
        return loss, (buffers, (logits.argmax(-1) == y).sum())

    def _call(self, tensors: Tensors, x: Tensor, keys: Tensor | None = None) -> Tensor:
        logits: Tensor
        if self.is_channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        dropout = nullcontext() if keys is None else SeededDropout(keys)
        with dropout, computing_in(self.precision, self.device, self.size > 1):
            logits = functional_call(self.module, tensors, (x,))
        return logits.float() if logits.dtype.itemsize < 4 else logits  # NumPy has no bfloat16

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return every model's logits [K, B, classes] on images [B, C, H, W] in evaluation mode."""
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
        """Return a copy of all parameters and buffers, [K, ...] each."""
        return {n: t.clone() for n, t in self._all().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters and buffers [K, ...] from a snapshot."""
        for target in (self.params, self.buffers):
            copies = {n: tensors[n].to(self.device, copy=True) for n in target}
            target.update({n: self.laid_out(t) for n, t in copies.items()})

    def model(self, k: int) -> nn.Module:
        """Return model `k` as a plain module, on the CPU and in evaluation mode."""
        module = copy.deepcopy(self.unused_module)
        for name, tensor in self._all().items():
            copied = tensor[k].cpu().clone(memory_format=torch.contiguous_format)
            _tensor(module, name).data = copied
        return module


def _first(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the images, labels, second labels and shares of the first model."""
    others, shares = batch.others, batch.shares
    if others is None or shares is None:
        return batch.x[0], batch.y[0], None, None
    return batch.x[0], batch.y[0], others[0], shares[0]


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    smoothing: Tensor | None,
    others: Tensor | None,
    shares: Tensor | None,
) -> Tensor:
    """Return the mean cross-entropy of logits [B, classes], of smoothed labels if it is given.

    Where second labels are given, the first have the shares [B], and those have the rest.

    Ten classes are too few for torch's own softmax to be vectorised: on a CPU it takes 5 times as
    long, a tenth of the step of a stack.
    """
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    log_sum = shifted.exp().sum(-1).log()
    chosen = shifted.gather(-1, labels[:, None]).squeeze(-1)
    if others is not None and shares is not None:
        rest = shifted.gather(-1, others[:, None]).squeeze(-1)
        chosen = torch.lerp(rest, chosen, shares.to(chosen.dtype))
    loss = (log_sum - chosen).mean()
    if smoothing is None:
        return loss
    uniform = (log_sum - shifted.mean(-1)).mean()  # the cross-entropy with all classes alike
    return torch.lerp(loss, uniform, smoothing.to(loss.dtype))


def _tensor(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer `name` of a module."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "mnist_exp."))


# of torch.nn, what may draw random numbers in training
_STOCHASTIC = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.FractionalMaxPool2d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
