"""A stack of K models against the same models as plain modules."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.training.dropout import SeededDropout
from mnist_exp.training.models import CNN, MLP
from mnist_exp.training.stack import Stack

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 8, 8), 4
Build = Callable[[], nn.Module]


def mlp() -> nn.Module:
    return MLP(SHAPE, CLASSES, hidden=(16, 8))


def cnn() -> nn.Module:
    return CNN(SHAPE, CLASSES, channels=(4, 6), hidden=8, dropout=0.0)


def plain(build: Build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def batch(size: int, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images [K, B, 1, 8, 8], labels [K, B]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, count, *SHAPE, generator=generator)
    return x, torch.randint(CLASSES, (size, count), generator=generator)


def keys(size: int) -> Tensor:
    return torch.arange(size) + 1


class Tied(nn.Module):
    """The second layer has the first one's weight, and the third its own bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.last = nn.Linear(64, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x.flatten(1)).relu()))
        return out


class Frozen(nn.Module):
    """A fixed random layer under a trained one, and a trained number of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(64, 16).requires_grad_(False)
        self.last = nn.Linear(16, CLASSES)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.fixed(x.flatten(1)).relu()) * self.scale
        return out


class Counting(nn.Module):
    """Two ways to change a buffer: in place, and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, CLASSES)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(()))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1))
        if self.training:
            self.calls += 1
            self.mean = 0.5 * self.mean + out.mean()
        return out


@pytest.mark.parametrize("build", [mlp, cnn, Tied, Frozen])
def test_models_start_as_after_manual_seed(build: Build) -> None:
    state = torch.get_rng_state()
    stack = Stack(build, [3, 0, 3], CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for k, seed in enumerate([3, 0, 3]):
        expected = plain(build, seed).state_dict()
        own = stack.model(k).state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[n], expected[n]) for n in expected)
    weights = stack.params[list(stack.params)[-1]]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("smoothing", [(0.0, 0.0, 0.0), (0.0, 0.1, 0.5)])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("build", [mlp, cnn, Tied, Frozen, Counting])
def test_gradients_equal_those_of_plain_modules(
    build: Build, size: int, smoothing: tuple[float, ...]
) -> None:
    smoothing = smoothing[-size:]
    stack = Stack(build, range(size), CPU)
    before = stack.snapshot()
    x, y = batch(size)
    smooth = torch.tensor(smoothing) if any(smoothing) else None
    grads, buffers, loss, correct = stack.gradients(
        stack.params, stack.buffers, x, y, keys(size), smooth
    )
    for k in range(size):
        module = plain(build, k)
        logits = module(x[k])
        expected = F.cross_entropy(logits, y[k], label_smoothing=smoothing[k])
        expected.backward()
        torch.testing.assert_close(loss[k], expected.detach(), rtol=1e-5, atol=1e-6)
        assert correct[k] == (logits.argmax(1) == y[k]).sum()
        trained = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        own = {n: g[k] for n, g in grads.items()}
        torch.testing.assert_close(own, trained, rtol=1e-4, atol=1e-6)
        rest: dict[str, Tensor] = {
            n: p for n, p in module.named_parameters() if not p.requires_grad
        }
        rest |= {n: b.detach() for n, b in module.named_buffers()}
        own = {n: b[k] for n, b in buffers.items()}
        torch.testing.assert_close(own, rest, rtol=1e-5, atol=1e-6)
    after = stack.snapshot()  # pure: what changed was handed back, and nothing else
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(t.requires_grad for t in (*grads.values(), *buffers.values(), loss))


@pytest.mark.parametrize("size", [1, 3])
def test_a_parameter_without_influence_has_a_gradient_of_zero(size: int) -> None:
    class Idle(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.fixed(x.flatten(1)))
            return out

    stack = Stack(Idle, range(size), CPU)
    grads, *_ = stack.gradients(stack.params, stack.buffers, *batch(size), keys(size), None)
    assert torch.equal(grads["scale"], torch.zeros(size))


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_is_that_of_plain_modules(size: int) -> None:
    def build() -> nn.Module:
        return CNN(SHAPE, CLASSES, channels=(4,), hidden=8, dropout=0.5)

    stack = Stack(build, range(size), CPU)
    x, y = batch(size)
    *_, buffers, _, _ = stack.gradients(stack.params, stack.buffers, x, y, keys(size), None)
    stack.buffers = buffers  # running statistics that are not those of the start
    for _ in range(2):
        logits = stack.logits(x[0])
        assert logits.shape == (size, len(x[0]), CLASSES)
        for k in range(size):
            expected = stack.model(k)(x[0]).detach()
            torch.testing.assert_close(logits[k], expected, rtol=1e-5, atol=1e-6)
    again = stack.gradients(stack.params, stack.buffers, x, y, keys(size), None)
    assert not torch.equal(again[1]["1.running_mean"], buffers["1.running_mean"])  # trains again


def test_a_model_owns_its_tensors() -> None:
    stack = Stack(Tied, [0, 1], CPU)
    x, _ = batch(1)
    before = stack.logits(x[0])
    model = stack.model(1)
    assert not model.training
    assert model.get_parameter("second.weight") is model.get_parameter("first.weight")
    torch.testing.assert_close(model(x[0]).detach(), before[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(stack.logits(x[0]), before)


def test_restore_brings_back_a_snapshot() -> None:
    stack = Stack(cnn, [0, 1], CPU)
    before = stack.snapshot()
    copy = {n: t.clone() for n, t in before.items()}
    for tensors in (stack.params, stack.buffers):
        for t in tensors.values():
            t += 1
    assert not torch.equal(stack.snapshot()["0.weight"], before["0.weight"])
    stack.restore(before)
    after = stack.snapshot()
    assert after.keys() == copy.keys()
    assert all(torch.equal(after[n], copy[n]) for n in copy)
    stack.params["0.weight"] += 1  # a later change is not the snapshot's
    assert torch.equal(before["0.weight"], copy["0.weight"])


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


def test_other_noise_is_not_the_same_for_every_run() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last((x + torch.randn_like(x)).flatten(1))
            return out

    stack = Stack(Noisy, [0, 0], CPU)
    x, y = batch(1)
    x, y = x.expand(2, *x.shape[1:]), y.expand(2, -1)
    *_, loss, _ = stack.gradients(stack.params, stack.buffers, x, y, keys(2), None)
    assert loss[0] != loss[1]


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
    x, y = batch(size)
    grads, _, loss, _ = stack.gradients(stack.params, stack.buffers, x, y, keys(size), None)
    for k in range(size):
        with SeededDropout(keys(size)[k]):
            mask = F.dropout(torch.ones(CLASSES, 64), 0.5)
        weight = torch.ones(CLASSES, 64, requires_grad=True)
        expected = F.cross_entropy(x[k].flatten(1) @ (weight * mask).T, y[k])
        torch.testing.assert_close(loss[k], expected.detach(), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(grads["weight"][k], gradient, rtol=1e-4, atol=1e-6)
    other = stack.gradients(stack.params, stack.buffers, x, y, keys(size) + 1, None)
    assert not torch.isclose(other[2], loss).any()


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
    x, y = batch(1)
    x, y = x.expand(2, *x.shape[1:]), y.expand(2, -1)

    def losses(*own: int) -> list[float]:
        found: list[float] = stack.gradients(
            stack.params, stack.buffers, x, y, torch.tensor(own), None
        )[2].tolist()
        return found

    first, second = losses(1, 2)
    assert first != pytest.approx(second)
    assert losses(2, 1) == pytest.approx([second, first])
    alone = Stack(Functional, [0], CPU)
    arguments = (x[:1], y[:1], torch.tensor([2]), None)
    assert alone.gradients(alone.params, alone.buffers, *arguments)[2].item() == pytest.approx(
        second
    )
    torch.testing.assert_close(stack.logits(x[0])[0], stack.model(0)(x[0]).detach())
