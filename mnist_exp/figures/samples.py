"""Figures of a data set and a model: the way from tensors to figures."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.data.dataset import PREVIEW_IMAGES, Dataset, Split
from mnist_exp.figures.images import sample_grid, weights_figure
from mnist_exp.figures.matrices import confusion_matrix
from mnist_exp.training import metrics
from mnist_exp.training.seeds import first_augmented


def first_images(dataset: Dataset) -> Figure:
    """Return a figure of the first 30 images of the training file with their labels."""
    labels = [dataset.classes[i] for i in dataset.preview.labels.tolist()]
    title = f"{dataset.name}: the first {len(labels)} images"
    return sample_grid(dataset.preview.images[:, 0].cpu().numpy(), labels, title=title)


def augmented_images(
    dataset: Dataset, augmentation: Augmentation, seed: int, batch_size: int
) -> Figure:
    """Return a figure of the first 30 images of epoch 1 as a run of this seed trains on them.

    Where images are mixed, a second line names the class of the smaller share.
    """
    given = first_augmented(dataset, augmentation, seed, batch_size, PREVIEW_IMAGES)
    levels = 255 * (given.x[0, :, 0] * dataset.std + dataset.mean)
    labels = [dataset.classes[i] for i in given.y[0].tolist()]
    second_lines: list[str] | None = None
    if given.others is not None and given.shares is not None:
        rest = (1 - given.shares[0]).tolist()
        others = [dataset.classes[i] for i in given.others[0].tolist()]
        pairs = zip(others, rest, strict=True)
        second_lines = [f"+ {s:.0%} {other}" if s >= 0.005 else "" for other, s in pairs]
    return sample_grid(
        levels.round().clamp(0, 255).to(torch.uint8).cpu().numpy(),
        labels,
        title=f"{dataset.name}: the first {len(labels)} images of epoch 1, augmented",
        note=augmentation.describe(),
        second_lines=second_lines,
    )


def predictions(
    dataset: Dataset, images: Tensor, labels: Tensor, probabilities: Tensor, title: str
) -> Figure:
    """Return a figure of up to 30 images with labels, predictions, and how sure those are.

    The images are uint8 [N, 1, H, W], the labels [N], the probabilities [N, classes].
    """
    confidence, predicted = probabilities.max(-1)
    return sample_grid(
        images[:, 0].cpu().numpy(),
        [dataset.classes[i] for i in labels.tolist()],
        [dataset.classes[i] for i in predicted.tolist()],
        confidence.tolist(),
        title=title,
    )


def draw_results(
    dataset: Dataset, split: Split, logits: Tensor, name: str = "test set"
) -> dict[str, Figure]:
    """Return the most confident mistakes, if any, and the confusion matrix, as figures by name.

    The logits are those of the split, [N, classes], on the CPU; the figures have its name.
    """
    probabilities, true = logits.softmax(-1), split.labels.cpu()
    confidence, predicted = probabilities.max(-1)
    wrong = (predicted != true).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:PREVIEW_IMAGES]
    figures = {}
    if len(worst):
        title = f"most confident of {len(wrong)} mistakes on the {name}"
        images = split.images.cpu()[worst]
        figures["mistakes"] = predictions(dataset, images, true[worst], probabilities[worst], title)
    counts = metrics.confusion(true, predicted, len(dataset.classes))
    figures["confusion"] = confusion_matrix(counts, dataset.classes, name)
    return figures


def first_layer(model: nn.Module, shape: tuple[int, int, int]) -> Figure | None:
    """Return a figure of the weights of an MLP's first layer, or of a CNN's first filters.

    The shape is that of an image, (C, H, W). Return None where the model begins otherwise.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weight = layers[0].weight.detach().float().cpu() if layers else torch.empty(0)
    if weight.dim() == 4 and weight.shape[1] == 1:
        size = " x ".join(map(str, weight.shape[2:]))
        return weights_figure(weight[:, 0].numpy(), f"{len(weight)} filters of {size}, first layer")
    if weight.dim() == 2 and weight.shape[1] == shape[1] * shape[2] and shape[0] == 1:
        images = weight.view(-1, *shape[1:]).numpy()
        return weights_figure(images, f"weights of the {len(weight)} units of the first layer")
    return None
