"""Images and labels as tensors: checked, split into train and validation, normalised."""

import hashlib
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_exp.data import sources
from mnist_exp.data.sources import DATASETS, DatasetSpec, IdxFile, format_shape
from mnist_exp.errors import ConfigError, did_you_mean

PREVIEW_IMAGES = 30  # the number of images that a figure shows of a data set


@dataclass(frozen=True)
class Split:
    """The images of one split, uint8 [N, 1, H, W], and their labels, int64 [N], from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """Return the split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DatasetInfo:
    """The part of a data set that a model trained on it has to keep."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image: (1, H, W)
    mean: float  # of the training split's pixels, scaled to [0, 1]
    std: float

    def normalise(self, images: Tensor) -> Tensor:
        """Return images [..., H, W] of 0 to 255 as float32, standardised by the training split."""
        return images.to(torch.float32, copy=True).sub_(255 * self.mean).mul_(1 / (255 * self.std))


@dataclass(frozen=True)
class Dataset(DatasetInfo):
    """Every split of a data set, and what a record needs in order to identify it."""

    name: str
    train: Split
    val: Split | None
    test: Split
    preview: Split  # the first images of the training file, in its order, whatever the split
    digest: str  # SHA-256 of the four unpacked files, one after the other
    source: str  # 'embedded' or the folder

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the data set on another device."""
        train, test, preview = (s.to(device) for s in (self.train, self.test, self.preview))
        val = self.val and self.val.to(device)
        return replace(self, train=train, val=val, test=test, preview=preview)

    def describe(self) -> dict[str, Any]:
        """Return what the record of a run says of its data set, as plain values."""
        splits = {"train": self.train, "test": self.test, "val": self.val}
        sizes = {name: len(split) for name, split in splits.items() if split is not None}
        return {
            "name": self.name,
            "source": self.source,
            "digest": self.digest,
            "shape": list(self.shape),
            "sizes": sizes,
        }


def load(
    name: str,
    *,
    root: str | None,
    val_size: int | None,
    train_size: int | None,
    split_seed: int,
    classes: Sequence[str] | None = None,
    cache: Path,
) -> Dataset:
    """Return the data set `name`: one of DATASETS, or 'idx' for four IDX files in a folder.

    A permutation that depends on `split_seed` alone decides the split: its last `val_size` images
    are validation, its first `train_size` are train; both keep the file's order.

    Args:
        name: The name of the data set.
        root: The folder of its files. Without it, MNIST is the embedded copy, and the others are
            downloaded to `cache` unless they are there.
        val_size: The size of the validation split; None is a tenth, 5,000 at most.
        train_size: The size of the training split; None is all the rest.
        split_seed: The seed of the permutation.
        classes: The names of the classes of 'idx', by default '0', '1', ...
        cache: The folder for downloads.

    Raises:
        ConfigError: Something is wrong with the request, the files or the network.
    """
    spec = _resolve(name, root, classes)
    default = sources.EMBEDDED if name == "mnist" else cache
    folder = default if root is None else Path(root)
    files, digest = _read(name, spec, folder)

    if not spec.classes:
        spec = replace(spec, classes=tuple(map(str, range(int(files[1].array.max()) + 1))))
    _check(files, spec)
    images, labels, test_images, test_labels = (torch.from_numpy(file.array) for file in files)
    if spec.kind == "EMNIST":  # stored column by column
        images, test_images = images.mT.contiguous(), test_images.mT.contiguous()
    everything = Split(images[:, None], labels.long() - spec.first_label)
    test = Split(test_images[:, None], test_labels.long() - spec.first_label)
    # a view would keep all images in memory
    preview = Split(everything.images[:PREVIEW_IMAGES].clone(), everything.labels[:PREVIEW_IMAGES])
    if val_size is None:
        val_size = min(5000, len(everything) // 10)
    train, val = _split(name, everything, val_size, train_size, split_seed)
    mean, std = _mean_and_std(train.images)
    if std == 0:
        raise ConfigError(f"{files[0].name}: every pixel of the training split is alike")
    height, width = images.shape[1:]
    info = tuple(spec.classes), (1, height, width), mean, std
    source = "embedded" if folder == sources.EMBEDDED else str(folder)
    return Dataset(*info, name, train, val, test, preview, digest, source)


def _resolve(name: str, root: str | None, classes: Sequence[str] | None) -> DatasetSpec:
    """Return what is known of the data set asked for; raise ConfigError if there is no such one."""
    known = (*DATASETS, "idx")
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"dataset.name={name}: must be one of {', '.join(known)}. {hint}".rstrip()
        )
    if name == "idx" and root is None:
        raise ConfigError("dataset.root: missing; dataset.name=idx needs the folder of its files")
    if name != "idx" and classes is not None:
        raise ConfigError(f"dataset.classes: only for dataset.name=idx; {name} has its own names")
    if root is not None:
        try:
            why = "" if stat.S_ISDIR(os.stat(root).st_mode) else "is not a folder"
        except FileNotFoundError:
            why = "there is no such folder"
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
        if why:
            raise ConfigError(f"dataset.root={root}: {why}; it must hold the files of {name}")
    return DATASETS.get(name) or DatasetSpec("", tuple(map(str, classes or ())))


def _read(name: str, spec: DatasetSpec, folder: Path) -> tuple[list[IdxFile], str]:
    """Return the four files of a data set, verified, and the SHA-256 of them all."""
    if name in ("mnist", "idx"):
        open_files = sources.idx_files(folder)
    else:
        open_files = sources.archives(name, spec, folder)
    try:
        kinds = zip(open_files, (sources.IMAGES, spec.labels) * 2, strict=True)
        files = [sources.unpack(*open_file, magic) for open_file, magic in kinds]
    except OSError as error:
        fault = error.strerror or error
        raise ConfigError(f"{error.filename or folder}: cannot be read ({fault})") from error
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.content.data)
    if name == "mnist" and digest.hexdigest() != sources.MNIST_DIGEST:
        for file, sha256 in zip(files, sources.SHA256[spec.kind].values(), strict=True):
            if hashlib.sha256(file.content.data).hexdigest() != sha256:
                raise ConfigError(
                    f"{file.name}: damaged, or not MNIST: the SHA-256 of its content must be"
                    f" {sha256}; leave dataset.root out for the copy inside mnist-exp, and"
                    " reinstall mnist-exp if it is that copy"
                )
    return files, digest.hexdigest()


def _check(files: Sequence[IdxFile], spec: DatasetSpec) -> None:
    """Raise ConfigError unless the files belong together and every label has a class.

    Their arrays are [N, H, W], [N], [M, H, W] and [M].
    """
    train, train_labels, test, test_labels = files
    for images, labels in ((train, train_labels), (test, test_labels)):
        if len(images.array) != len(labels.array):
            raise ConfigError(
                f"{images.name}: {len(images.array)} images, but {len(labels.array)} labels in"
                f" {labels.name}; every image must have one"
            )
    sizes = [format_shape(images.array.shape[1:]) for images in (train, test)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{test.name}: images of {sizes[1]} pixels, but {sizes[0]} in {train.name}; they must"
            " be of one size"
        )
    count = len(spec.classes)
    can_be_seen = all(name.isprintable() and name.strip() for name in spec.classes)
    if count < 2 or len(set(spec.classes)) < count or not can_be_seen:
        raise ConfigError(
            f"dataset.classes: {', '.join(map(repr, spec.classes))}: must be 2 or more names, all"
            " different, each in one line and not blank (by default the numbers from 0 to the"
            f" greatest label in {train_labels.name})"
        )
    low, high = spec.first_label, spec.first_label + count - 1
    for labels in (train_labels, test_labels):
        wrong = np.flatnonzero((labels.array < low) | (labels.array > high))
        if len(wrong):
            raise ConfigError(
                f"{labels.name}: label {labels.array[wrong[0]]} at index {wrong[0]}: must be from"
                f" {low} to {high}, as there are {count} classes; dataset.classes=[...] can name"
                " more"
            )


def _split(
    name: str, file: Split, val_size: int, train_size: int | None, seed: int
) -> tuple[Split, Split | None]:
    """Return the training and the validation split of the training file."""
    count = len(file)
    if not 0 <= val_size < count:
        raise ConfigError(
            f"dataset.val_size={val_size}: must be from 0 to {count - 1}, as {name} has {count}"
            " training images"
        )
    rest = count - val_size
    size = rest if train_size is None else train_size
    if not 1 <= size <= rest:
        raise ConfigError(
            f"dataset.train_size={size}: must be from 1 to {rest}, the {count} training images of"
            f" {name} less dataset.val_size={val_size}"
        )
    if size == count:
        return file, None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept, held = order[:size].sort().values, order[rest:].sort().values
    val = Split(file.images[held], file.labels[held]) if val_size else None
    return Split(file.images[kept], file.labels[kept]), val


def _mean_and_std(images: Tensor) -> tuple[float, float]:
    """Return both of uint8 pixels over 255, exactly: by how often each of 256 levels occurs."""
    counts = torch.bincount(images.flatten(), minlength=256).tolist()
    n = sum(counts)
    total = sum(count * level for level, count in enumerate(counts))
    squares = sum(count * level**2 for level, count in enumerate(counts))
    return total / (255 * n), math.sqrt(n * squares - total**2) / (255 * n)
