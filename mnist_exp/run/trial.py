"""The trial of a run before anything is created for it: all that training does, with few images."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mnist_exp.config.schema import Config
from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.errors import ConfigError, first_line
from mnist_exp.run.build import check_logits, explaining, precision_of, restore_weights
from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.seeds import first_augmented
from mnist_exp.training.stack import Batch, Stack
from mnist_exp.training.step import TrainStep

BATCH, STEPS = 2, 2


def try_run(
    config: Config,
    build: Callable[[], nn.Module],
    dataset: Dataset,
    run: RunSpec,
    spec: StackSpec,
) -> Stack:
    """Train a model for two steps on augmented images, evaluate, save and load it, on the CPU.

    Args:
        config: The config of the run.
        build: Makes the model.
        dataset: The data set, on the CPU.
        run: The numbers of the run.
        spec: Its other settings.

    Returns:
        The model that was tried, as a stack of one.

    Raises:
        ConfigError: The run would fail by its model, by an epoch's last batch, by its
            augmentation, or by its optimizer.
    """
    few = _few_images(dataset)
    images = few.normalise(few.test.images)
    classes = len(dataset.classes)
    model = config.model["_target_"].rpartition(".")[2]
    with torch.random.fork_rng(devices=[]):
        with explaining("model", model):
            precision = precision_of(config)
            stack = Stack(build, [run.seed], torch.device("cpu"), precision)
            with torch.no_grad():  # the module is a skeleton, whose own tensors are not trained
                check_logits(stack.module(images), images, classes)
            check_logits(stack.logits(images[:1])[0], images[:1], classes)
            _gradients(stack, few, run, BATCH)
        lengths = spec.epoch_sizes(len(dataset.train)).lengths
        uneven = next((n for n in lengths if n % spec.batch_size == 1), None)
        if spec.batch_size == 1:
            _try_single_image(stack, few, run, "training.batch_size=1: is one image a batch")
        elif uneven is not None:
            words = f"leaves one image for the last batch of {uneven} images"
            _try_single_image(stack, few, run, f"training.batch_size={spec.batch_size}: {words}")
        if spec.augmentation.is_on:
            with explaining("augmentation", spec.augmentation.describe()):
                first_augmented(few, spec.augmentation, run.seed, BATCH, STEPS * BATCH)
        with explaining("optimizer", spec.optimizer.__qualname__):
            _train(TrainStep(stack, few, [run], replace(spec, batch_size=BATCH)))
        with explaining("model", model):
            loaded = _save_and_load(stack, Stack(build, [run.seed], stack.device, precision))
            _check_export(stack.model(0), images)
            if not torch.equal(_predict(stack, images), _predict(loaded, images)):
                raise ValueError(
                    "it predicts otherwise once it was saved and loaded: training changes what "
                    "its state_dict does not hold. Keep that in parameters or buffers"
                )
    return stack


def _few_images(dataset: Dataset) -> Dataset:
    """Return a data set with as many images as the trial takes."""

    def first(split: Split, count: int) -> Split:
        chosen = torch.arange(count) % len(split)  # a split may have a single image
        return Split(split.images[chosen], split.labels[chosen])

    train, test = first(dataset.train, STEPS * BATCH), first(dataset.test, BATCH)
    return replace(dataset, train=train, val=None, test=test)


def _gradients(stack: Stack, dataset: Dataset, run: RunSpec, size: int) -> None:
    """Do the forward and the backward pass of a batch of so many images."""
    x = dataset.normalise(dataset.train.images[:size])[None]
    y = dataset.train.labels[:size][None]
    smoothing = torch.tensor([run.label_smoothing])
    stack.gradients(stack.params, stack.buffers, Batch(x, y, torch.zeros(1).long(), smoothing))


def _try_single_image(stack: Stack, dataset: Dataset, run: RunSpec, cause: str) -> None:
    """Raise ConfigError, with the cause, if a model cannot train on a batch of one image."""
    try:
        _gradients(stack, dataset, run, 1)
    except Exception as error:  # batch normalisation of single values, above all
        raise ConfigError(
            f"{cause}, on which this model cannot train ({first_line(error)}). Choose another "
            f"batch size"
        ) from error


def _train(step: TrainStep) -> None:
    """Do the steps of an epoch. Raise ValueError without a learning rate."""
    if "lr" not in step.defaults[0]:
        raise ValueError("it has no lr, which a schedule sets")
    rates = np.full((STEPS, 1), float(step.defaults[0]["lr"]))
    order, keys = torch.arange(STEPS * BATCH)[None], torch.zeros(STEPS, 1).long()
    step(order, keys, step.hyperparameters(0, rates))


def _save_and_load(trained: Stack, other: Stack) -> Stack:
    """Return the other stack of one with the model of the trained one, by way of a file.

    Raises:
        ValueError: The state of the model holds what is not saved.
    """
    weights = trained.model(0).state_dict()
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"its state_dict holds {name}, a {type(value).__name__}, but only tensors are "
                f"saved. Keep what it needs in buffers, or let the constructor make it"
            )
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    restore_weights(other, torch.load(file, weights_only=True))
    return other


def _check_export(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError unless a model can be saved for MLflow, as `save_model` does at the end.

    Exporting takes seconds, so it is tried only where the other way, pickling, is none.
    """
    import cloudpickle  # with which MLflow pickles

    try:
        torch.save(model, io.BytesIO(), pickle_module=cloudpickle)
    except Exception as error:  # whatever a part of a model raises
        try:
            torch.export.export(model, (images,))
        except Exception:
            raise ValueError(
                f"it can neither be pickled ({first_line(error)}) nor exported by torch.export, so "
                f"MLflow could not keep it"
            ) from error


def _predict(stack: Stack, images: Tensor) -> Tensor:
    """Return logits, of a model that is random in evaluation the same each time, and no nan."""
    torch.default_generator.manual_seed(0)
    return stack.logits(images).nan_to_num()
