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
    rate that suits the convolutions makes the last layers wander.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64),
        hidden: int = 64,
        dropout: float = 0.2,
    ) -> None:
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
