"""A stack of K models against the same models as plain modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.models import CNN, StridedCNN
from mnist_exp.training.schedules import Constant
from mnist_exp.training.stack import Stack
from mnist_exp.training.step import TrainStep
from tests.training.helpers import (
    CLASSES,
    CPU,
    SHAPE,
    Build,
    MakeDataset,
    batch,
    cnn,
    mlp,
    resnet,
    same_batch,
)


def plain(build: Build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


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
    smooth = torch.tensor(smoothing) if any(smoothing) else None
    given = batch(size)._replace(smoothing=smooth)
    grads, buffers, loss, correct = stack.gradients(stack.params, stack.buffers, given)
    for k in range(size):
        module = plain(build, k)
        logits = module(given.x[k])
        expected = F.cross_entropy(logits, given.y[k], label_smoothing=smoothing[k])
        expected.backward()
        torch.testing.assert_close(loss[k], expected.detach(), rtol=1e-5, atol=1e-6)
        assert correct[k] == (logits.argmax(1) == given.y[k]).sum()
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
    grads, *_ = stack.gradients(stack.params, stack.buffers, batch(size))
    assert torch.equal(grads["scale"], torch.zeros(size))


@pytest.mark.parametrize("size", [1, 3])
def test_evaluation_is_that_of_plain_modules(size: int) -> None:
    def build() -> nn.Module:
        return CNN(SHAPE, CLASSES, channels=(4,), hidden=8, dropout=0.5)

    stack = Stack(build, range(size), CPU)
    given = batch(size)
    *_, buffers, _, _ = stack.gradients(stack.params, stack.buffers, given)
    stack.buffers = buffers  # running statistics that are not those of the start
    for _ in range(2):
        logits = stack.logits(given.x[0])
        assert logits.shape == (size, len(given.x[0]), CLASSES)
        for k in range(size):
            expected = stack.model(k)(given.x[0]).detach()
            torch.testing.assert_close(logits[k], expected, rtol=1e-5, atol=1e-6)
    again = stack.gradients(stack.params, stack.buffers, given)
    assert not torch.equal(again[1]["1.running_mean"], buffers["1.running_mean"])  # trains again


def test_a_model_owns_its_tensors() -> None:
    stack = Stack(Tied, [0, 1], CPU)
    x = batch(1).x
    before = stack.logits(x[0])
    model = stack.model(1)
    assert not model.training
    assert model.get_parameter("second.weight") is model.get_parameter("first.weight")
    torch.testing.assert_close(model(x[0]).detach(), before[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(stack.logits(x[0]), before)


def test_a_module_may_keep_a_part_of_its_graph() -> None:
    class Keeping(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    stack = Stack(Keeping, [0], CPU)
    given = batch(1)
    stack.gradients(stack.params, stack.buffers, given)
    model = stack.model(0)
    torch.testing.assert_close(model(given.x[0]).detach(), stack.logits(given.x[0])[0])


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


def strided() -> nn.Module:
    return StridedCNN(SHAPE, CLASSES, width=4, layers=[1, 1])


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def test_convolutions_of_a_model_alone_are_channels_last_throughout(
    make_dataset: MakeDataset,
) -> None:
    stack = Stack(cnn, [0], CPU)
    found: list[Tensor] = []
    for module in stack.module.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d):
            module.register_forward_hook(lambda *call: found.append(call[-1]))
    data, rates = make_dataset(), np.full((8, 1), 0.1)
    given = RunSpec(0, {"lr": 0.1, "momentum": 0.9}, Constant())
    step = TrainStep(stack, data, [given], StackSpec(SGD, 1, 16))
    for _ in range(2):  # traced, and again from a state in torch's usual layout
        step(torch.arange(128)[None], torch.zeros(8, 1).long(), step.hyperparameters(0, rates))
        stack.logits(data.normalise(data.train.images[:16]))
        (momentum,) = step.optimizer_state["4.weight"]
        assert is_channels_last(stack.params["4.weight"][0]) and is_channels_last(momentum[0])
        assert all(is_channels_last(t) for t in found)
        stack.restore({n: t.contiguous() for n, t in stack.snapshot().items()})
    grads, *_ = stack.gradients(stack.params, stack.buffers, batch(1))
    selected = step.select([0])
    for t in (grads["4.weight"], selected.optimizer_state["4.weight"][0]):
        assert t.stride()[1:] == stack.params["4.weight"].stride()[1:]
    assert stack.model(0).get_parameter("4.weight").is_contiguous()


@pytest.mark.parametrize("build", [cnn, strided, resnet])
def test_channels_last_computes_what_float64_does(build: Build) -> None:
    stack = Stack(build, [0], CPU)
    exact = Stack(lambda: build().double(), [0], CPU)
    assert stack.is_channels_last
    given = batch(1)
    found = stack.gradients(stack.params, stack.buffers, given)
    expected = exact.gradients(exact.params, exact.buffers, given._replace(x=given.x.double()))
    for ours, its in zip(found[:2], expected[:2], strict=True):  # gradients, and buffers
        one, other = (torch.cat([t[n].double().flatten() for n in its]) for t in (ours, its))
        assert (one - other).norm() < 1e-5 * other.norm()
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=0.0)


def test_several_models_and_modules_of_ones_own_keep_the_usual_layout() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).view(len(x), -1))
            return out

    alone = Stack(Viewing, [0], CPU)
    assert alone.logits(batch(1).x[0]).shape == (1, 24, CLASSES)
    several = Stack(cnn, [0, 1], CPU)
    assert several.params["4.weight"].is_contiguous()
    assert is_channels_last(several.select([1]).params["4.weight"][0])


def test_other_noise_is_not_the_same_for_every_run() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last((x + torch.randn_like(x)).flatten(1))
            return out

    stack = Stack(Noisy, [0, 0], CPU)
    *_, loss, _ = stack.gradients(stack.params, stack.buffers, same_batch(2))
    assert loss[0] != loss[1]
