"""The convolutional models: their shapes and sizes, and that all of them learns."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from mnist_exp.training.models import CNN, BasicBlock, ResNet, StridedCNN
from tests.training.helpers import CLASSES, SHAPE, MakeDataset, fit, run

Build = Callable[[tuple[int, int, int], int], nn.Module]


def strided(shape: tuple[int, int, int], classes: int) -> StridedCNN:
    return StridedCNN(shape, classes, width=4, dropout=0.1)


def shallow(shape: tuple[int, int, int], classes: int) -> StridedCNN:
    return StridedCNN(shape, classes, width=4, layers=[0, 1, 1])


def pooled_last(shape: tuple[int, int, int], classes: int) -> StridedCNN:
    return StridedCNN(shape, classes, width=4, layers=[1, 1, 0])


def residual(shape: tuple[int, int, int], classes: int) -> ResNet:
    return ResNet(shape, classes, width=4, blocks=[2, 1])


MODELS = [strided, shallow, pooled_last, residual]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 15), (1, 28, 28), (2, 33, 8)])
@pytest.mark.parametrize("build", MODELS)
def test_any_images_from_8_by_8_become_logits(build: Build, shape: tuple[int, int, int]) -> None:
    module = build(shape, 7)
    assert module(torch.randn(2, *shape)).shape == (2, 7)
    assert module.eval()(torch.randn(1, *shape)).shape == (1, 7)


def test_maps_are_as_large_as_they_are_said_to_be() -> None:
    sizes: list[tuple[int, ...]] = []
    module = StridedCNN((1, 28, 28), 10, width=16)
    for layer in module:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.register_forward_hook(lambda *call: sizes.append(tuple(call[-1].shape[1:])))
    module(torch.zeros(2, 1, 28, 28))
    assert sizes == [
        *[(16, 14, 14)] * 3,
        *[(16, 7, 7), (32, 7, 7), (32, 7, 7)],
        *[(32, 3, 3), (64, 3, 3)],
    ]


def test_the_number_of_parameters_follows_from_width_and_layers() -> None:
    # each convolution has a norm of 2 w in place of a bias; the last layer gets maps of 3 x 3
    maps = 9 * (24 * 24 + 24 * 24 + 24 * 48 + 48 * 48 + 48 * 96) + 2 * (24 + 24 + 48 + 48 + 96)
    stem, last = 25 * 24 + 2 * 24, 9 * 96 * 10 + 10
    assert parameters(StridedCNN((1, 28, 28), 10, width=24)) == stem + maps + last
    stem, maps, last = 25 * 8 + 2 * 8, 9 * (8 * 16 + 16 * 32) + 2 * (16 + 32), 9 * 32 * 10 + 10
    strided_cnn = StridedCNN((1, 28, 28), 10, width=8, layers=[0, 1, 1])
    assert parameters(strided_cnn) == stem + maps + last
    maps, last = 9 * (8 * 8 + 8 * 16) + 2 * (8 + 16), 9 * 16 * 10 + 10
    strided_cnn = StridedCNN((1, 28, 28), 10, width=8, layers=[1, 1, 0])
    assert parameters(strided_cnn) == stem + maps + last
    # a stem, blocks of 2 * 9 w^2 with two norms, and where they change the shape a 1x1 with a norm
    stem, last = 25 * 8 + 2 * 8, 16 * 10 + 10
    blocks = 2 * 9 * 8 * 8 + 2 * 2 * 8 + 9 * (8 * 16 + 16 * 16) + 8 * 16 + 3 * 2 * 16
    assert parameters(ResNet((1, 28, 28), 10, width=8, blocks=[1, 1])) == stem + blocks + last


def test_a_block_that_adds_nothing_hands_on_what_is_positive() -> None:
    block = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.get_parameter("residual.4.weight"))
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("build", MODELS)
def test_every_parameter_has_a_gradient(build: Build) -> None:
    module = build(SHAPE, CLASSES)
    module(torch.randn(16, *SHAPE)).square().mean().backward()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, Tensor) and gradient.abs().sum() > 0, name


@pytest.mark.parametrize("build", MODELS)
def test_it_learns(build: Build, make_dataset: MakeDataset) -> None:
    data = make_dataset(train=600, val=100)  # faint patterns of 4 classes in noise
    trained = fit(lambda: build(data.shape, CLASSES), data, [run(lr=0.1)], SGD, epochs=10)
    assert trained.epochs[-1].metrics[0]["val/accuracy"] > 0.6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StridedCNN((1, 6, 28), 10), ["layers=[2, 2, 1]", "6 x 28 is too small"]),
        (lambda: StridedCNN((1, 9, 6), 10), ["Add model.layers=[2,2]"]),
        (lambda: CNN((1, 28, 28), 10, channels=[8, 0]), ["channels=[8, 0]", "1 channel or more"]),
        (lambda: CNN((1, 28, 28), 10, hidden=0), ["hidden=0", "1 hidden unit or more"]),
        (lambda: StridedCNN((1, 28, 28), 10, layers=[]), ["layers=[]"]),
        (lambda: StridedCNN((1, 28, 28), 10, layers=[1, -1]), ["layers=[1, -1]", "0 or more"]),
        (lambda: StridedCNN((1, 28, 28), 10, width=0), ["width=0", "1 or more"]),
        (lambda: ResNet((1, 28, 28), 10, blocks=[1, 0]), ["blocks=[1, 0]", "1 or more"]),
        (
            lambda: ResNet((1, 28, 28), 10, blocks=[1] * 6),
            ["6 times", "28 x 28 is too small", "model.blocks=[1,1,1,1,1]"],
        ),
    ],
)
def test_impossible_numbers_are_refused(make: Callable[[], nn.Module], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("size", [1, 2, 3, 28])
def test_the_blocks_that_are_proposed_for_small_images_fit(size: int) -> None:
    with pytest.raises(ValueError, match="is too small") as error:
        ResNet((1, size, size), 10, width=4, blocks=[1] * 9)
    blocks = json.loads(str(error.value).rpartition("=")[2])
    network = ResNet((1, size, size), 10, width=4, blocks=blocks).eval()
    assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_the_layers_that_are_proposed_for_small_images_fit(size: int) -> None:
    with pytest.raises(ValueError, match="is too small") as error:
        StridedCNN((1, size, 28), 10, width=4, layers=[1] * 9)
    layers = json.loads(str(error.value).rpartition("=")[2])
    network = StridedCNN((1, size, 28), 10, width=4, layers=layers)
    assert network(torch.zeros(2, 1, size, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="is too small"):
        StridedCNN((1, size, 28), 10, width=4, layers=[*layers, 1])
