"""Images and labels as tensors: checked, split into train and validation, normalised."""

import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_exp.data import sources
from mnist_exp.data.sources import DATASETS, DatasetSpec
from mnist_exp.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, 1, H, W]; labels: int64 [N], from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DatasetInfo:
    """What a model has to know of the data that it was trained on."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image: (1, H, W)
    mean: float
    std: float

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [..., H, W] -> float32 of mean 0 and deviation 1 over the training split."""
        return images.to(torch.float32).sub_(255 * self.mean).mul_(1 / (255 * self.std))


@dataclass(frozen=True)
class Dataset:
    """Every split of a data set, and what a record needs in order to identify it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    first: Split  # the first 30 images of the training file, in its order, whatever the split
    mean: float  # of the training split's pixels, scaled to [0, 1]
    std: float
    digest: str  # SHA-256 of the four unpacked files, one after the other
    source: str  # 'embedded' or the folder

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: (1, H, W)."""
        height, width = self.train.images.shape[2:]
        return 1, height, width

    def to(self, device: torch.device | str) -> "Dataset":
        train, test, first = (s.to(device) for s in (self.train, self.test, self.first))
        val = self.val and self.val.to(device)
        return replace(self, train=train, val=val, test=test, first=first)

    @property
    def facts(self) -> DatasetInfo:
        """What the model keeps of it."""
        return DatasetInfo(self.classes, self.shape, self.mean, self.std)

    def normalise(self, images: Tensor) -> Tensor:
        """As its facts do."""
        return self.facts.normalise(images)


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
    """The data set `name`: one of `DATASETS`, or 'idx' for four IDX files in the folder `root`.

    Without `root`, MNIST is the embedded copy, and the others are downloaded to `cache` unless they
    are there. A permutation that depends on `split_seed` alone decides the split: its last
    `val_size` images (None: a tenth, 5,000 at most) are validation, its first `train_size` (None:
    all the rest) are train; both keep the file's order. `classes` names the classes of 'idx', by
    default '0', '1', ...
    Raises ConfigError for whatever is wrong with the request, the files or the network.
    """
    if name not in (*DATASETS, "idx"):
        near = difflib.get_close_matches(name, (*DATASETS, "idx"), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"dataset.name={name}: must be one of {', '.join(DATASETS)}, idx{hint}")
    if name == "idx" and root is None:
        raise ConfigError("dataset.root: missing; dataset.name=idx needs the folder of its files")
    if name != "idx" and classes is not None:
        raise ConfigError(f"dataset.classes: only for dataset.name=idx; {name} has its own names")
    spec = sources.SPECS.get(name) or DatasetSpec("", tuple(map(str, classes or ())), (), ())
    embedded = name == "mnist" and root is None
    folder = (
        sources.EMBEDDED if embedded else Path(root).expanduser() if root is not None else cache
    )

    if root is not None and not folder.is_dir():
        why = "is not a folder" if folder.exists() else "there is no such folder"
        raise ConfigError(f"dataset.root={root}: {why}; it must hold the files of {name}")
    names, arrays, digest = [], [], hashlib.sha256()
    published = spec.sha256 if name == "mnist" else (None,) * 4
    open_files = (
        sources.idx_files(folder)
        if name in ("mnist", "idx")
        else sources.archives(name, spec, folder)
    )
    try:
        for (file_name, file, size), magic, sha256 in zip(
            open_files, (sources.IMAGES, spec.labels) * 2, published, strict=True
        ):
            raw, array = sources.unpack(file_name, file, size, magic)
            if sha256 and hashlib.sha256(raw.data).hexdigest() != sha256:
                raise ConfigError(
                    f"{file_name}: damaged, or not MNIST: the SHA-256 of its content must be"
                    f" {sha256}; leave dataset.root out for the copy inside mnist-exp, and"
                    " reinstall mnist-exp if it is that copy"
                )
            digest.update(raw.data)
            names.append(file_name)
            arrays.append(array)
    except OSError as error:
        fault = error.strerror or error
        raise ConfigError(f"{error.filename or folder}: cannot be read ({fault})") from error

    if not spec.classes:
        spec = replace(spec, classes=tuple(map(str, range(int(arrays[1].max()) + 1))))
    _check(names, arrays, spec)
    images, labels, test_images, test_labels = map(torch.from_numpy, arrays)
    if spec.kind == "EMNIST":  # stored column by column
        _transpose(images)
        _transpose(test_images)
    everything = Split(images[:, None], labels.long() - spec.first_label)
    test = Split(test_images[:, None], test_labels.long() - spec.first_label)
    first = Split(everything.images[:30].clone(), everything.labels[:30])
    if val_size is None:
        val_size = min(5000, len(everything) // 10)
    train, val = _split(name, everything, val_size, train_size, split_seed)
    mean, std = _mean_and_std(train.images)
    if std == 0:
        raise ConfigError(f"{names[0]}: every pixel of the training split is alike")
    source = "embedded" if embedded else str(folder)
    return Dataset(
        name, spec.classes, train, val, test, first, mean, std, digest.hexdigest(), source
    )


def _check(names: Sequence[str], arrays: Sequence[np.ndarray], spec: DatasetSpec) -> None:
    """The files belong together, [N, H, W], [N], [M, H, W], [M], and every label has a class."""
    for i in (0, 2):
        if len(arrays[i]) != len(arrays[i + 1]):
            raise ConfigError(
                f"{names[i]}: {len(arrays[i])} images, but {len(arrays[i + 1])} labels in"
                f" {names[i + 1]}; every image must have one"
            )
    sizes = [sources.times(arrays[i].shape[1:]) for i in (0, 2)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{names[2]}: images of {sizes[1]} pixels, but {sizes[0]} in {names[0]}; they must be"
            " of one size"
        )
    count = len(spec.classes)
    if count < 2 or len(set(spec.classes)) < count:
        raise ConfigError(
            f"dataset.classes: {', '.join(spec.classes)}: must be 2 or more, all different (by"
            f" default the numbers from 0 to the greatest label in {names[1]})"
        )
    low, high = spec.first_label, spec.first_label + count - 1
    for i in (1, 3):
        wrong = np.flatnonzero((arrays[i] < low) | (arrays[i] > high))
        if len(wrong):
            raise ConfigError(
                f"{names[i]}: label {arrays[i][wrong[0]]} at index {wrong[0]}: must be from {low}"
                f" to {high}, as there are {count} classes; dataset.classes=[...] can name more"
            )


def _split(
    name: str, file: Split, val_size: int, train_size: int | None, seed: int
) -> tuple[Split, Split | None]:
    """Train and validation. Uses `file` up: its memory becomes the training split's."""
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
    # In ascending order, no image is overwritten before it has moved, and never are all of them in
    # memory twice.
    for start in range(0, size, 4096):
        block = kept[start : start + 4096]
        file.images[start : start + len(block)] = file.images[block]
    return Split(file.images[:size], file.labels[kept]), val


def _transpose(images: Tensor) -> None:
    """[N, S, S], in place, a block at a time: never are all of them in memory twice."""
    for start in range(0, len(images), 4096):
        block = images[start : start + 4096]
        block.copy_(block.mT.clone())


def _mean_and_std(images: Tensor) -> tuple[float, float]:
    """Of uint8 pixels over 255: exact, by how often each of the 256 levels occurs."""
    counts = torch.bincount(images.flatten(), minlength=256).tolist()
    n = sum(counts)
    total = sum(count * level for level, count in enumerate(counts))
    squares = sum(count * level**2 for level, count in enumerate(counts))
    return total / (255 * n), math.sqrt(n * squares - total**2) / (255 * n)
