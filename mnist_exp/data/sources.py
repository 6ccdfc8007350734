"""The files of a data set: found or fetched, verified, and unpacked.

Nothing unverified is trusted: MNIST's unpacked files, and the other sets' archives or, of
Fashion-MNIST, what they hold, must have the published SHA-256. A folder of one's own files is
checked against its headers to the byte.
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
from collections import defaultdict
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


def _published_digests() -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the published files, by their data set's kind and by their name.

    Those of MNIST are of its unpacked files, as in its canonical distribution (mnist/README.md);
    the others are of archives, from tensorflow_datasets/url_checksums/*.txt in tensorflow/datasets.
    "FashionMNIST-unpacked" has those of what the archives hold: with the name and the time of the
    originals in their headers, Debian's archives have the published SHA-256.
    """
    digests: dict[str, dict[str, str]] = defaultdict(dict)
    for line in Path(__file__).with_name("sha256.txt").read_text().splitlines():
        sha256, path = line.split()
        kind, name = path.split("/")
        digests[kind][name] = sha256
    return dict(digests)


SHA256 = _published_digests()
MNIST_DIGEST = "b2d8f5bf39174ee5ffeefa97e42d673c35432b411bb5d1f74fbbeddae7f1690a"


@dataclass(frozen=True)
class DatasetSpec:
    """A data set of four files: training images and labels, test images and labels."""

    kind: str  # its folder in torchvision's layout, and its key in SHA256
    classes: Sequence[str]
    url: str = ""  # of the folder of its archives
    members: tuple[str, ...] = ()  # the four files in the one archive; else each is an archive
    labels: bytes = LABELS
    first_label: int = 0


def _emnist(part: str, classes: str, first_label: int = 0) -> DatasetSpec:
    url = "https://biometrics.nist.gov/cs_links/EMNIST/"
    members = tuple(
        f"gzip/emnist-{part}-{split}-{content}-ubyte.gz"
        for split in ("train", "test")
        for content in ("images-idx3", "labels-idx1")
    )
    return DatasetSpec("EMNIST", classes, url, members, first_label=first_label)


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")  # fmt: skip
DATASETS = {  # the URLs are those that torchvision has
    "mnist": DatasetSpec("MNIST", string.digits),
    "fashion_mnist": DatasetSpec(
        "FashionMNIST", _FASHION, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    ),
    "kmnist": DatasetSpec(
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    ),
    "qmnist": DatasetSpec(
        "QMNIST",
        string.digits,
        "https://raw.githubusercontent.com/facebookresearch/qmnist/master/",
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
    for archive, sha256 in SHA256[spec.kind].items():
        stored = [path for path in (home / archive, root / archive) if path.is_file()]
        path = stored[0] if stored else _download(name, spec, archive, sha256, home)
        with path.open("rb") as file:
            unpacked = SHA256.get(f"{spec.kind}-unpacked", {}).get(archive)
            if _sha256(file) != sha256 and (unpacked is None or _unpacked_sha256(file) != unpacked):
                raise ConfigError(
                    f"{path}: damaged, or not of {name}: its SHA-256 must be {sha256};"
                    " delete it to have it downloaded"
                )
            if not spec.members:
                yield str(path), file, path.stat().st_size
                continue
            with zipfile.ZipFile(file) as bundle:
                for member in spec.members:
                    with bundle.open(member) as inner:
                        yield f"{path}/{member}", inner, bundle.getinfo(member).file_size


def unpack(name: str, file: IO[bytes], size: int, magic: bytes) -> IdxFile:
    """Read an IDX file; raise ConfigError if it is not whole and of the kind expected.

    Args:
        name: The name of the file, for messages.
        file: The file, open; it may be packed by gzip, whatever its name says.
        size: Its size in bytes, as it is stored.
        magic: The four bytes that it must begin with.
    """
    is_packed = file.read(2) == b"\x1f\x8b"  # RFC 1952
    file.seek(0)
    stream: Any = gzip.GzipFile(fileobj=file) if is_packed else file
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
        raw = np.empty(min(length, size * 1032 if is_packed else size), np.uint8)
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
    path, url = folder / archive, spec.url + archive
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
            f" {url} ({error}); put {', '.join(SHA256[spec.kind])} into {folder} by"
            " hand, or say dataset.root=FOLDER for a folder that has them"
        ) from error


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
    if isinstance(response, urllib.error.URLError) and isinstance(response.reason, OSError):
        raise response.reason  # which the other only wraps
    if isinstance(response, Exception):
        raise response
    return response


def _sha256(file: IO[bytes]) -> str:
    """Return the hex SHA-256 of the rest of `file`, and rewind it."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return digest


def _unpacked_sha256(file: IO[bytes]) -> str:
    """Return the hex SHA-256 of what a gzip file holds, "" if it is not whole, and rewind it."""
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            return hashlib.file_digest(unpacked, "sha256").hexdigest()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return ""
    finally:
        file.seek(0)


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape as in "60000x28x28"."""
    return "x".join(map(str, shape))
