"""Models: plain PyTorch modules that take the shape of an image and the number of classes.

A module that is named in a config gets `input_shape` (channels, height, width) and `num_classes`
from the dataset, where its constructor has arguments of these names.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; with none hidden, multinomial logistic regression."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
    ) -> None:
        channels, height, width = input_shape
        if any(units < 1 for units in hidden):
            raise ValueError(f"hidden={list(hidden)}: every layer needs 1 unit or more")
        layers: list[nn.Module] = [nn.Flatten()]  # [B, C, H, W] -> [B, C * H * W]
        for fan_in, fan_out in pairwise((channels * height * width, *hidden)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        fan_in = hidden[-1] if hidden else channels * height * width
        super().__init__(*layers, nn.Linear(fan_in, num_classes))


class LeNet5(nn.Sequential):
    """The network of LeCun, Bottou, Bengio & Haffner 1998, with ReLU and max pooling.

    28 x 28 images are padded to the paper's 32 x 32. Other sizes, from 12 x 12, work alike.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        channels, height, width = input_shape
        if min(height, width) < 12:
            raise ValueError(f"LeNet5 needs images of 12 x 12 or more, got {height} x {width}")
        rest = [(size // 2 - 4) // 2 for size in (height, width)]
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=2),  # [B, C, 28, 28] -> [B, 6, 28, 28]
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),  # [B, 6, 14, 14] -> [B, 16, 10, 10]
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * rest[0] * rest[1], 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )


class CNN(nn.Sequential):
    """Blocks of convolution, batch normalisation, ReLU and pooling; then one hidden layer.

    Batch normalisation (Ioffe & Szegedy 2015) in the hidden layer as well: without it, a learning
    rate that suits the convolutions makes the last layers wander. Raise ValueError for a layer
    without channels or units.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64),
        hidden: int = 64,
        dropout: float = 0.2,
    ) -> None:
        if min(hidden, *channels) < 1:
            raise ValueError(
                f"channels={list(channels)}, hidden={hidden}: it needs 1 channel or more in each "
                f"block, and 1 hidden unit or more"
            )
        fan_in, height, width = input_shape
        layers: list[nn.Module] = []
        for fan_out in channels:
            layers += [
                nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),  # [B, C, H, W] -> [B, C, H / 2, W / 2], up
            ]
            fan_in, height, width = fan_out, -(-height // 2), -(-width // 2)
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(fan_in * height * width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )


class StridedCNN(nn.Sequential):
    """A convolution of stride 2, then 3x3 convolutions, with pooling between them; a linear layer.

    Each convolution is followed by batch normalisation (Ioffe & Szegedy 2015) and ReLU. On a CPU,
    layers at the full size of the images take longer than their arithmetic would, so the first
    convolution halves height and width.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 16,
        layers: Sequence[int] = (2, 2, 1),
        dropout: float = 0.0,
    ) -> None:
        """Make the network.

        Args:
            input_shape: The shape of an image, (C, H, W).
            num_classes: The number of logits.
            width: The number of channels of the first convolution; it is doubled at each pooling.
            layers: The number of 3x3 convolutions at each size of the maps, from the largest on.
            dropout: The share of the last layer's inputs that are dropped.

        Raises:
            ValueError: The images are too small, or a number is.
        """
        channels, *size = input_shape
        if width < 1 or not layers or min(layers) < 0:
            raise ValueError(
                f"width={width}, layers={list(layers)}: it needs a width of 1 or more, and a "
                f"number of layers (0 or more) for each size of the maps"
            )
        size = [-(-side // 2) for side in size]
        modules = _convolution(channels, width, 5, stride=2)  # [B, C, H, W] -> [B, w, H / 2, W / 2]
        fan_in = width
        for stage, count in enumerate(layers):
            if stage > 0:  # [B, c, H, W] -> [B, c, H / 2, W / 2], down
                modules.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
            for _ in range(count):
                modules += _convolution(fan_in, width * 2**stage, 3)
                fan_in = width * 2**stage
        if min(size) < 1:
            halvings = (-(-min(input_shape[1:]) // 2)).bit_length()  # the first rounds up
            fitting = ",".join(map(str, layers[:halvings]))
            raise ValueError(
                f"layers={list(layers)}: they halve images {len(layers)} times, for which "
                f"{input_shape[1]} x {input_shape[2]} is too small. Add model.layers=[{fitting}]"
            )
        modules.append(nn.Flatten())
        if dropout:
            modules.append(nn.Dropout(dropout))
        super().__init__(*modules, nn.Linear(fan_in * size[0] * size[1], num_classes))


class ResNet(nn.Sequential):
    """A residual network of basic blocks (He, Zhang, Ren & Sun 2016), for small images.

    The first convolution has stride 2, for the reason of StridedCNN, and no pooling follows it.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 32,
        blocks: Sequence[int] = (1, 1, 1),
    ) -> None:
        """Make the network.

        Args:
            input_shape: The shape of an image, (C, H, W).
            num_classes: The number of logits.
            width: The number of channels of the first stage; each stage has twice as many.
            blocks: The number of blocks in each stage; the first of a stage halves the maps, but
                for the first stage.

        Raises:
            ValueError: A number is below 1, or the images are too small for so many stages.
        """
        if width < 1 or not blocks or min(blocks) < 1:
            raise ValueError(
                f"width={width}, blocks={list(blocks)}: it needs a width of 1 or more, and a "
                f"number of blocks (1 or more) for each stage"
            )
        # to maps of one pixel, rounding up; the first stage comes after one at least
        halvings = max(1, (max(input_shape[1:]) - 1).bit_length())
        if len(blocks) > halvings:
            fitting = ",".join(map(str, blocks[:halvings]))
            raise ValueError(
                f"blocks={list(blocks)}: they halve images {len(blocks)} times, for which "
                f"{input_shape[1]} x {input_shape[2]} is too small. Add model.blocks=[{fitting}]"
            )
        modules = _convolution(input_shape[0], width, 5, stride=2)
        fan_in = width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                modules.append(BasicBlock(fan_in, width * 2**stage, stride))
                fan_in = width * 2**stage
        pooling = nn.AdaptiveAvgPool2d(1)  # [B, c, H, W] -> [B, c, 1, 1]
        super().__init__(*modules, pooling, nn.Flatten(), nn.Linear(fan_in, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition" (2016).
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        *last, _ = _convolution(fan_out, fan_out, 3)  # whose ReLU comes after the sum
        self.residual = nn.Sequential(*_convolution(fan_in, fan_out, 3, stride), *last)
        self.shortcut = nn.Sequential()  # the identity
        if stride > 1 or fan_in != fan_out:
            *projection, _ = _convolution(fan_in, fan_out, 1, stride)
            self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps [B, fan_out, H / stride, W / stride] of maps [B, fan_in, H, W]."""
        result: Tensor = self.residual(x) + self.shortcut(x)
        return result.relu()


def _convolution(fan_in: int, fan_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size of the maps (of stride 1), with what follows it."""
    return [
        nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(),
    ]


class DeployedModel(nn.Module):
    """A trained model with its normalisation inside, for images from torchvision's `ToTensor`."""

    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model = model
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of float images [B, C, H, W] from 0 to 1."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits.float()  # whatever the model computes with
