"""Where images come from: found, verified, unpacked, checked and split, as uint8 tensors.

Nothing unverified is trusted: MNIST's unpacked files and the other sets' archives must have the
published SHA-256, and a folder of one's own files is checked against its headers to the byte.
"""

import difflib
import gzip
import hashlib
import http.client
import logging
import math
import queue
import string
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mnist_exp.errors import ConfigError

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("mnist")
ANSWER_SECONDS = 5.0  # how long a download waits for the server: without a network it ends here
BLOCK = 1 << 20  # bytes read at once

# An IDX file starts with two zeros, the type code and the number of dimensions.
IMAGES, LABELS, QMNIST_LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01", b"\0\0\x0c\x02"
CONTENT = {
    IMAGES: "images (bytes, 3 dimensions)",
    LABELS: "labels (bytes, 1 dimension)",
    QMNIST_LABELS: "QMNIST's labels (int32, 2 dimensions)",
}


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

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [..., H, W] -> float32 of mean 0 and deviation 1 over the training split."""
        return images.to(torch.float32).sub_(255 * self.mean).mul_(1 / (255 * self.std))


@dataclass(frozen=True)
class _Spec:
    """A published data set. Four files: training images and labels, test images and labels."""

    kind: str  # torchvision's class, and its folder in torchvision's layout
    classes: tuple[str, ...]
    files: tuple[str, ...]  # the archives; of EMNIST, the members of the one archive
    sha256: tuple[str, ...]  # of the archives; of MNIST, of the unpacked files
    labels: bytes = LABELS
    first_label: int = 0

    @property
    def archives(self) -> tuple[str, ...]:
        return ("gzip.zip",) if self.kind == "EMNIST" else self.files


def _files(train: str, test: str, labels: str = "labels-idx1-ubyte") -> tuple[str, ...]:
    contents = ("images-idx3-ubyte", labels)
    return tuple(f"{part}-{content}.gz" for part in (train, test) for content in contents)


def _emnist(part: str, classes: str, first_label: int = 0) -> _Spec:
    files = _files(f"gzip/emnist-{part}-train", f"gzip/emnist-{part}-test")
    sha256 = ("fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",)
    return _Spec("EMNIST", tuple(classes), files, sha256, first_label=first_label)


# The digests of MNIST are published with its canonical distribution (mnist/README.md), those of the
# archives by tensorflow/datasets in tensorflow_datasets/url_checksums/*.txt.
SPECS = {
    "mnist": _Spec(
        "MNIST",
        tuple(string.digits),
        _files("train", "t10k"),
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion_mnist": _Spec(
        "FashionMNIST",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        _files("train", "t10k"),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "kmnist": _Spec(
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        _files("train", "t10k"),
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
    ),
    "qmnist": _Spec(
        "QMNIST",
        tuple(string.digits),
        _files("qmnist-train", "qmnist-test", "labels-idx2-int"),
        (
            "9e26a7bf1683614e065d7b76460ccd52807165b3f22561fb782bd9f38c52b51d",
            "2c05dc77f6b916b38e455e97ab129a42a444f3dbef09b278a366f82904e0dd9f",
            "43fc22bf7498b8fc98de98369d72f752d0deabc280a43a7bcc364ab19e57b375",
            "9fbcbe594c3766fdf4f0b15c5165dc0d1e57ac604e01422608bb72c906030d06",
        ),
        labels=QMNIST_LABELS,
    ),
    "emnist_letters": _emnist("letters", string.ascii_uppercase, first_label=1),
    # Lower-case letters that look like their capitals are one class with them.
    "emnist_balanced": _emnist("balanced", string.digits + string.ascii_uppercase + "abdefghnqrt"),
    "emnist_digits": _emnist("digits", string.digits),
}
KNOWN = tuple(SPECS)


def load(
    name: str,
    *,
    root: str | None,
    val_size: int,
    train_size: int | None,
    split_seed: int,
    classes: Sequence[str] | None = None,
    cache: Path,
) -> Dataset:
    """The data set `name`: one of `KNOWN`, or 'idx' for four IDX files in the folder `root`.

    Without `root`, MNIST is the embedded copy, and the others are downloaded to `cache` unless they
    are there. A permutation that depends on `split_seed` alone decides the split: its last
    `val_size` images are validation, its first `train_size` (None: all the rest) are train; both
    keep the file's order. `classes` names the classes of 'idx', by default '0', '1', ...
    Raises ConfigError for whatever is wrong with the request, the files or the network.
    """
    if name not in (*KNOWN, "idx"):
        near = difflib.get_close_matches(name, (*KNOWN, "idx"), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"dataset.name={name}: must be one of {', '.join(KNOWN)}, idx{hint}")
    if name == "idx" and root is None:
        raise ConfigError("dataset.root: missing; dataset.name=idx needs the folder of its files")
    if name != "idx" and classes is not None:
        raise ConfigError(f"dataset.classes: only for dataset.name=idx; {name} has its own names")
    spec = SPECS.get(name) or _Spec("", tuple(map(str, classes or ())), (), ())
    embedded = name == "mnist" and root is None
    folder = EMBEDDED if embedded else Path(root).expanduser() if root is not None else cache

    names, arrays, digest = [], [], hashlib.sha256()
    published = spec.sha256 if name == "mnist" else (None,) * 4
    open_files = _idx_files(folder) if name in ("mnist", "idx") else _archives(name, spec, folder)
    try:
        for (file_name, file, size), magic, sha256 in zip(
            open_files, (IMAGES, spec.labels) * 2, published, strict=True
        ):
            raw, array = _unpack(file_name, file, size, magic)
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
    train, val = _split(name, everything, val_size, train_size, split_seed)
    mean, std = _mean_and_std(train.images)
    if std == 0:
        raise ConfigError(f"{names[0]}: every pixel of the training split is alike")
    source = "embedded" if embedded else str(folder)
    return Dataset(
        name, spec.classes, train, val, test, first, mean, std, digest.hexdigest(), source
    )


_OpenFile = tuple[str, IO[bytes], int]  # its name, for messages; itself; its size in bytes


def _idx_files(root: Path) -> Iterator[_OpenFile]:
    """The four IDX files in `root` or below it where torchvision keeps MNIST, one after the other,
    in any of the usual spellings."""
    if not root.is_dir():
        fault = "is not a folder" if root.exists() else "there is no such folder"
        raise ConfigError(f"dataset.root={root}: {fault}; it must hold the four IDX files")
    paths = []
    for parts in (("train",), ("t10k", "test")):
        for content in ("images{}idx3-ubyte", "labels{}idx1-ubyte"):
            stems = [f"{part}-{content.format(mark)}" for part in parts for mark in "-."]
            names = [stem + end for stem in stems for end in ("", ".gz")]
            here = [place / name for place in (root, root / "MNIST" / "raw") for name in names]
            found = [path for path in here if path.is_file()]
            if not found:
                raise ConfigError(f"dataset.root={root}: a file is missing: {' or '.join(names)}")
            paths.append(found[0])
    for path in paths:
        with path.open("rb") as file:
            yield str(path), file, path.stat().st_size


def _archives(name: str, spec: _Spec, root: Path) -> Iterator[_OpenFile]:
    """The four files of a published set, one after the other, out of its verified archives, which
    are in `root` or below it where torchvision keeps them, or else are downloaded to there."""
    home = root / spec.kind / "raw"
    for archive, sha256 in zip(spec.archives, spec.sha256, strict=True):
        found = [path for path in (home / archive, root / archive) if path.is_file()]
        path = found[0] if found else _download(name, spec, archive, sha256, home)
        with path.open("rb") as file:
            if _sha256(file) != sha256:
                raise ConfigError(
                    f"{path}: damaged, or not of {name}: its SHA-256 must be {sha256};"
                    " delete it to have it downloaded"
                )
            if archive in spec.files:
                yield str(path), file, path.stat().st_size
                continue
            with zipfile.ZipFile(file) as bundle:
                for member in spec.files:
                    with bundle.open(member) as inner:
                        yield f"{path}/{member}", inner, bundle.getinfo(member).file_size


def _unpack(name: str, file: IO[bytes], size: int, magic: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of an IDX file, header included, and what they hold: [N, H, W] or [N], a view."""
    zipped = name.endswith(".gz")
    stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
    try:
        start = stream.read(4)
        if start != magic:
            hint = f", as {CONTENT[start]} do: mislabelled?" if start in CONTENT else ""
            raise ConfigError(
                f"{name}: not an IDX file of {CONTENT[magic]}: it must start with {magic.hex(' ')}"
                f" and starts with {start.hex(' ') or 'nothing'}{hint}"
            )
        header = np.frombuffer(start + stream.read(4 * magic[3]), np.uint8)
        if len(header) < 4 + 4 * magic[3]:
            raise ConfigError(f"{name}: truncated: it ends within its header")
        shape = header[4:].view(">u4").tolist()
        element = np.dtype(np.uint8 if magic[2] == 8 else ">i4")
        length = len(header) + math.prod(shape) * element.itemsize
        # A false header must not reserve more memory than the file can fill: deflate packs at best
        # 1032 to 1 (https://zlib.net/zlib_tech.html).
        raw = np.empty(min(length, size * 1032 if zipped else size), np.uint8)
        raw[: len(header)] = header
        done = len(header)
        while block := stream.read(min(BLOCK, len(raw) - done)):
            raw[done : done + len(block)] = np.frombuffer(block, np.uint8)
            done += len(block)
        surplus = stream.read(1)  # also has gzip compare its checksum
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{name}: damaged gzip file ({error}); replace it") from error
    if done < length or surplus:
        fault = "goes on: trailing bytes" if surplus else f"has {done}: truncated"
        raise ConfigError(
            f"{name}: {_times(shape)} by its header, {length} bytes in all; the file {fault}"
        )
    if length == len(header):
        raise ConfigError(f"{name}: holds nothing: {_times(shape)} by its header")
    array = raw[len(header) :].view(element).reshape(shape)
    if magic == QMNIST_LABELS:  # [N, 8]: the class, then the writer, ...
        array = array[:, 0].astype(np.int64)
    return raw, array


def _check(names: Sequence[str], arrays: Sequence[np.ndarray], spec: _Spec) -> None:
    """The files belong together, [N, H, W], [N], [M, H, W], [M], and every label has a class."""
    for i in (0, 2):
        if len(arrays[i]) != len(arrays[i + 1]):
            raise ConfigError(
                f"{names[i]}: {len(arrays[i])} images, but {len(arrays[i + 1])} labels in"
                f" {names[i + 1]}; every image must have one"
            )
    sizes = [_times(arrays[i].shape[1:]) for i in (0, 2)]
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


def _download(name: str, spec: _Spec, archive: str, sha256: str, folder: Path) -> Path:
    """`archive` into `folder`: whole and verified, or not at all."""
    from torchvision import datasets  # takes 1.3 s and 160 MB, so not before it is needed

    kind: Any = getattr(datasets, spec.kind)
    if spec.kind == "EMNIST":
        url = kind.url
    elif spec.kind == "QMNIST":
        pairs = [pair for part in kind.resources.values() for pair in part]
        url = next(url for url, _ in pairs if url.endswith(f"/{archive}"))
    else:
        url = kind.mirrors[0] + archive
    log.info("downloading %s to %s", url, folder)
    try:
        with _answer(url) as response:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial:
                path = Path(partial, archive)
                with path.open("w+b") as file:
                    while block := response.read(BLOCK):
                        file.write(block)
                    file.seek(0)
                    if _sha256(file) != sha256:
                        raise OSError(f"incomplete or altered: its SHA-256 is not {sha256}")
                return path.replace(folder / archive)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"dataset.name={name}: {archive} is missing and cannot be downloaded from {url}"
            f" ({error}); put {', '.join(spec.archives)} into {folder} by hand, or say"
            " dataset.root=FOLDER for a folder that has them"
        ) from error


def _answer(url: str) -> Any:
    """The open response of `url`, in time or never: in a thread, because a socket's timeout leaves
    out the look-up of the host's name, which can take far longer where there is no network."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "mnist-exp"})
        try:
            answer.put(urllib.request.urlopen(request, timeout=ANSWER_SECONDS))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} s") from None
    if isinstance(response, urllib.error.HTTPError):  # an exception and an open response in one
        response.close()
    if isinstance(response, Exception):
        raise response
    return response


def _sha256(file: IO[bytes]) -> str:
    """Of the rest of `file`, which is then back at its beginning."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
