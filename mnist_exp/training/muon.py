"""Muon: steps along orthogonalised momentum for matrices, and AdamW for all other parameters."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

# Of Jordan et al.: with them, five iterations bring all but tiny singular values to about 1.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS, EPS = 5, 1e-7


class Muon(torch.optim.Optimizer):
    """The arguments of Muon; the updates themselves are those of a stack (`StackedMuon`).

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). It takes every
    parameter of two and more dimensions, a kernel of a convolution as the matrix [O, I * h * w].
    Biases, and the scales and shifts of norms, are left to AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        adamw_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Check the arguments.

        Args:
            params: The parameters.
            lr: The learning rate of the matrices; a matrix [O, I] with more rows than columns moves
                sqrt(O / I) times as far.
            weight_decay: The decoupled weight decay of all parameters.
            momentum: The share of the old momentum in the new.
            nesterov: Whether to look ahead, as Nesterov's momentum does.
            adamw_lr: The learning rate of all other parameters, which follows the schedule of `lr`.
            betas: The decay rates of AdamW.
            eps: The least denominator of AdamW.

        Raises:
            ValueError: One is out of range.
        """
        if lr <= 0:
            raise ValueError(f"lr={lr}: must be above 0, as adamw_lr follows its schedule")
        if eps <= 0:
            raise ValueError(f"eps={eps}: must be above 0, as no gradient at all is divided by it")
        for name, value in (("weight_decay", weight_decay), ("adamw_lr", adamw_lr)):
            if value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")
        for name, share in (("momentum", momentum), ("betas", betas[0]), ("betas", betas[1])):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share}: must be from 0 to below 1")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adamw_lr": adamw_lr,
            "betas": betas,
            "eps": eps,
            "decoupled_weight_decay": True,
            "amsgrad": False,
            "maximize": False,
        }
        super().__init__(params, defaults)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices [K, R, C] with singular values of about 1, by Newton-Schulz iterations."""
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=EPS)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:  # the smaller of the two products with its own transpose is enough
        x = x.transpose(1, 2)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.transpose(1, 2))
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    result: Tensor = x.transpose(1, 2) if is_tall else x
    return result
