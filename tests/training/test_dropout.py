"""Dropout whose masks are a function of a key."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.training.dropout import SeededDropout
from mnist_exp.training.stack import Stack
from tests.training.helpers import CLASSES, CPU, batch, same_batch


def masks(key: int, p: float = 0.5, calls: int = 1, shape: tuple[int, ...] = (64, 50)) -> Tensor:
    """[calls, *shape]: what dropout makes of ones in one forward pass."""
    with SeededDropout(torch.tensor(key)):
        return torch.stack([F.dropout(torch.ones(shape), p) for _ in range(calls)])


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    ones = torch.stack([masks(key, p)[0] for key in range(200)])  # 640,000 values
    assert ones.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    kept = (ones > 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
    # no key, row or column has a share of its own
    for dims, count in (((1, 2), 64 * 50), ((0, 2), 200 * 50), ((0, 1), 200 * 64)):
        spread = (kept.mean(dims) - (1 - p)) / (deviation / count**0.5)
        assert spread.abs().max() < 5
        assert 0.6 < spread.std() < 1.4


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p: float) -> None:
    assert torch.equal(masks(1, p), torch.full((1, 64, 50), 1 - p))


def test_dropout_is_for_training() -> None:
    ones = torch.ones(64, 50)
    with SeededDropout(torch.tensor(1)):
        assert torch.equal(F.dropout(ones, 0.5, training=False), ones)
        assert torch.equal(nn.Dropout(0.5).eval()(ones), ones)
        assert not torch.equal(nn.Dropout(0.5)(ones), ones)


def test_dropout_masks_are_independent() -> None:
    """Between steps and runs (keys, next to each other too), calls and positions."""
    both = torch.cat([masks(7, calls=3), masks(8, calls=3), masks(123_456_789, calls=3)])
    signs = both.flatten(1) - 1  # -1 or 1
    correlation = signs @ signs.T / signs.shape[1]
    assert (correlation - torch.eye(9)).abs().max() < 5 / signs.shape[1] ** 0.5
    for shift in (1, 2, 50):
        assert (signs * signs.roll(shift, 1)).mean(1).abs().max() < 5 / signs.shape[1] ** 0.5


def test_dropout_masks_are_a_function_of_their_key() -> None:
    state = torch.get_rng_state()
    assert torch.equal(masks(7, calls=2), masks(7, calls=2))
    assert torch.equal(torch.get_rng_state(), state)
    stacked = torch.vmap(lambda key: _masked(key), randomness="error")(torch.tensor([7, 8]))
    assert torch.equal(stacked, torch.stack([masks(7)[0], masks(8)[0]]))


def _masked(key: Tensor) -> Tensor:
    with SeededDropout(key):
        return F.dropout(torch.ones(64, 50), 0.5)


@pytest.mark.filterwarnings("ignore:dropout.d")  # torch on what it will refuse some day
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_drops_what_torch_drops_together(module: type[nn.Module], rank: int) -> None:
    if module is nn.Dropout1d:
        rank = min(rank, 3)  # torch takes no more
    shape = (40, 40, 7, 6, 5)[:rank]  # of 40 values not all are alike

    def shared(dropped: Tensor) -> list[bool]:
        """Along which dimensions all values are alike."""
        return [bool((dropped == dropped.narrow(d, 0, 1)).all()) for d in range(len(shape))]

    expected = module(0.5)(torch.ones(shape))
    with SeededDropout(torch.tensor(1)):
        assert shared(module(0.5)(torch.ones(shape))) == shared(expected)


@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_goes_through_the_masks_of_its_loss(size: int) -> None:
    class Dropping(nn.Module):
        """Its loss tells the mask, and so does its gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(CLASSES, 64))

        def forward(self, x: Tensor) -> Tensor:
            w = F.dropout(self.weight, 0.5, self.training)
            return torch.einsum("bi,ci->bc", x.flatten(1), w)

    stack = Stack(Dropping, range(size), CPU)
    given = batch(size)
    grads, _, loss, _ = stack.gradients(stack.params, stack.buffers, given)
    for k in range(size):
        with SeededDropout(given.keys[k]):
            mask = F.dropout(torch.ones(CLASSES, 64), 0.5)
        weight = torch.ones(CLASSES, 64, requires_grad=True)
        expected = F.cross_entropy(given.x[k].flatten(1) @ (weight * mask).T, given.y[k])
        torch.testing.assert_close(loss[k], expected.detach(), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(grads["weight"][k], gradient, rtol=1e-4, atol=1e-6)
    others = given._replace(keys=given.keys + 1)
    assert not torch.isclose(stack.gradients(stack.params, stack.buffers, others)[2], loss).any()


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
def test_every_kind_of_dropout_follows_the_key(name: str) -> None:
    """Called as a function, so that no module of the stack shows it."""
    function = getattr(F, name)
    shape = {"dropout1d": (8, 8), "dropout3d": (2, 2, 4, 4)}.get(name, (8, 2, 4))

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(len(x), *shape)
            x = function(x.flatten(2) if name == "dropout1d" else x, 0.5, self.training)
            out: Tensor = self.last(x.flatten(1))
            return out

    stack = Stack(Functional, [0, 0], CPU)

    def losses(stack: Stack, *keys: int) -> list[float]:
        given = same_batch(1)._replace(keys=torch.tensor(keys))
        found: list[float] = stack.gradients(stack.params, stack.buffers, given)[2].tolist()
        return found

    first, second = losses(stack, 1, 2)
    assert first != pytest.approx(second)
    assert losses(stack, 2, 1) == pytest.approx([second, first])
    assert losses(Stack(Functional, [0], CPU), 2) == pytest.approx([second])
    x = batch(1).x
    torch.testing.assert_close(stack.logits(x[0])[0], stack.model(0)(x[0]).detach())
