"""The files of a data set: found or fetched, verified, and unpacked.

Nothing unverified is trusted: MNIST's unpacked files and the other sets' archives must have the
published SHA-256, and a folder of one's own files is checked against its headers to the byte.
"""

import gzip
import hashlib
import http.client
import logging
import math
import os
import queue
import shutil
import string
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mnist_exp.errors import ConfigError
from mnist_exp.system.files import replace

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("mnist")
ANSWER_SECONDS = 5.0  # the longest wait for a server: without a network a download ends here
WAIT_SECONDS = 1.0  # the wait for another process's download after which a message says so
BLOCK = 1 << 20  # the number of bytes that are read at once

# An IDX file starts with two zeros, the type code and the number of dimensions.
IMAGES, LABELS, QMNIST_LABELS = b"\0\0\x08\x03", b"\0\0\x08\x01", b"\0\0\x0c\x02"
CONTENT = {
    IMAGES: "images (bytes, 3 dimensions)",
    LABELS: "labels (bytes, 1 dimension)",
    QMNIST_LABELS: "QMNIST's labels (int32, 2 dimensions)",
}


@dataclass(frozen=True)
class DatasetSpec:
    """A published data set of four files: training images and labels, test images and labels."""

    kind: str  # torchvision's class, and its folder in torchvision's layout
    classes: tuple[str, ...]
    files: tuple[str, ...]  # the archives; of EMNIST, the members of the one archive
    sha256: tuple[str, ...]  # of the archives; of MNIST, of the unpacked files
    labels: bytes = LABELS
    first_label: int = 0
    digest: str = ""  # of MNIST, the SHA-256 of the four unpacked files, one after the other

    @property
    def archives(self) -> tuple[str, ...]:
        """The names of the files as they are published."""
        return ("gzip.zip",) if self.kind == "EMNIST" else self.files


def _spec(kind: str, classes: Sequence[str], files: tuple[str, ...], **more: Any) -> DatasetSpec:
    """Return a data set with its digests from sha256.txt.

    Those of MNIST's unpacked files are published with its canonical distribution
    (mnist/README.md), those of the archives by tensorflow/datasets in
    tensorflow_datasets/url_checksums/*.txt.
    """
    lines = Path(__file__).with_name("sha256.txt").read_text().splitlines()
    digests = tuple(line.split()[0] for line in lines if line.split()[1].startswith(f"{kind}/"))
    return DatasetSpec(kind, tuple(classes), files, digests, **more)


def _files(train: str, test: str, labels: str = "labels-idx1-ubyte") -> tuple[str, ...]:
    contents = ("images-idx3-ubyte", labels)
    return tuple(f"{part}-{content}.gz" for part in (train, test) for content in contents)


def _emnist(part: str, classes: str, **more: Any) -> DatasetSpec:
    files = _files(f"gzip/emnist-{part}-train", f"gzip/emnist-{part}-test")
    return _spec("EMNIST", classes, files, **more)


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")  # fmt: skip
DATASETS = {
    "mnist": _spec(
        "MNIST",
        string.digits,
        _files("train", "t10k"),
        digest="b2d8f5bf39174ee5ffeefa97e42d673c35432b411bb5d1f74fbbeddae7f1690a",
    ),
    "fashion_mnist": _spec("FashionMNIST", _FASHION, _files("train", "t10k")),
    "kmnist": _spec(
        "KMNIST",
        ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
        _files("train", "t10k"),
    ),
    "qmnist": _spec(
        "QMNIST",
        string.digits,
        _files("qmnist-train", "qmnist-test", "labels-idx2-int"),
        labels=QMNIST_LABELS,
    ),
    "emnist_letters": _emnist("letters", string.ascii_uppercase, first_label=1),
    # lower-case letters that look like their capitals are one class with them
    "emnist_balanced": _emnist("balanced", string.digits + string.ascii_uppercase + "abdefghnqrt"),
    "emnist_digits": _emnist("digits", string.digits),
}


OpenFile = tuple[str, IO[bytes], int]  # its name, for messages; itself; its size in bytes


class IdxFile(NamedTuple):
    """An IDX file in memory."""

    name: str
    content: NDArray[np.uint8]  # every byte of the unpacked file, header included
    array: np.ndarray  # what it holds, [N, H, W] or [N]: a view of the content


def idx_files(root: Path) -> Iterator[OpenFile]:
    """Yield the four IDX files in `root`, or below it where torchvision keeps MNIST.

    They may have any of the usual spellings.
    """
    paths = []
    for parts in (("train",), ("t10k", "test")):
        for content in ("images{}idx3-ubyte", "labels{}idx1-ubyte"):
            stems = [f"{part}-{content.format(mark)}" for part in parts for mark in "-."]
            names = [stem + end for stem in stems for end in ("", ".gz")]
            folders = (root, root / "MNIST" / "raw")
            candidates = [folder / name for folder in folders for name in names]
            path = next((path for path in candidates if path.is_file()), None)
            if path is None:
                raise ConfigError(f"dataset.root={root}: a file is missing: {' or '.join(names)}")
            paths.append(path)
    for path in paths:
        with path.open("rb") as file:
            yield str(path), file, path.stat().st_size


def archives(name: str, spec: DatasetSpec, root: Path) -> Iterator[OpenFile]:
    """Yield the four files of a published data set, out of its verified archives.

    The archives are in `root` or below it where torchvision keeps them, or else are downloaded to
    there.
    """
    home = root / spec.kind / "raw"
    for archive, sha256 in zip(spec.archives, spec.sha256, strict=True):
        stored = [path for path in (home / archive, root / archive) if path.is_file()]
        path = stored[0] if stored else _download(name, spec, archive, sha256, home)
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


def unpack(name: str, file: IO[bytes], size: int, magic: bytes) -> IdxFile:
    """Read an IDX file; raise ConfigError if it is not whole and of the kind expected.

    Args:
        name: The name of the file, for messages; if it ends in .gz, the file is packed.
        file: The file, open.
        size: Its size in bytes, as it is stored.
        magic: The four bytes that it must begin with.
    """
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
            f"{name}: {format_shape(shape)} by its header, {length} bytes in all; the file {fault}"
        )
    if length == len(header):
        raise ConfigError(f"{name}: holds nothing: {format_shape(shape)} by its header")
    array = raw[len(header) :].view(element).reshape(shape)
    if magic == QMNIST_LABELS:  # [N, 8]: the class, then the writer, ...
        array = array[:, 0].astype(np.int64)
    return IdxFile(name, raw, array)


def _download(name: str, spec: DatasetSpec, archive: str, sha256: str, folder: Path) -> Path:
    """Download an archive to `folder`, whole and verified or not at all, and return its path.

    One process does it for all that want it at the same time.
    """
    path, url = folder / archive, _url(spec, archive)
    try:
        with _lock_folder(path):
            if path.is_file():
                return path
            for leftover in folder.glob(".download-*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            log.info("downloading %s to %s", url, folder)
            with (
                open_url(url) as response,
                tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as partial,
            ):
                with Path(partial, archive).open("w+b") as file:
                    shutil.copyfileobj(response, file)
                    file.seek(0)  # also flushes
                    if _sha256(file) != sha256:
                        raise OSError(f"incomplete or altered: its SHA-256 is not {sha256}")
                    os.fsync(file.fileno())  # a power cut must not leave the name without content
                replace(Path(partial, archive), path)
                return path
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"dataset.name={name}: {archive} is missing and cannot be downloaded from"
            f" {url} ({error}); put {', '.join(spec.archives)} into {folder} by"
            " hand, or say dataset.root=FOLDER for a folder that has them"
        ) from error


def _url(spec: DatasetSpec, archive: str) -> str:
    """Return the address of an archive, which torchvision knows."""
    from torchvision import datasets  # takes 1.3 s and 160 MB, so not before it is needed

    kind: Any = getattr(datasets, spec.kind)
    if spec.kind == "EMNIST":
        return str(kind.url)
    if spec.kind == "QMNIST":
        files = [file for part in kind.resources.values() for file in part]
        return next(str(url) for url, _ in files if url.endswith(f"/{archive}"))
    return str(kind.mirrors[0] + archive)


def _lock_folder(path: Path) -> AbstractContextManager[object]:
    """Return a lock, acquired, on downloads to the folder of `path`, which is made if need be.

    The lock ends with its process, however that ends. Its file stays: who deletes the file of a
    lock that others wait for lets two of them in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(".download.lock"))
    try:
        return lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        log.info("waiting for %s: another process is downloading to %s", path.name, path.parent)
        return lock.acquire()


def open_url(url: str) -> Any:
    """Return the open response of `url`; raise TimeoutError after ANSWER_SECONDS.

    A thread waits for it, because a socket's timeout leaves out the look-up of the host's name,
    which can take far longer where there is no network.
    """
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
    """Return the hex SHA-256 of the rest of `file`, and rewind it."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape as in "60000x28x28"."""
    return "x".join(map(str, shape))
