"""Images: every way in, every fault of a file, the split, and downloads, shared or failing."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from mnist_exp.data import sources
from mnist_exp.data.dataset import Dataset, Split, load
from mnist_exp.errors import ConfigError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read(name: str, root: Path | None, **changes: Any) -> Dataset:
    """`load` with everything that a test does not speak of left out."""
    rest = {"val_size": 0, "train_size": None, "split_seed": 0, "cache": Path("no such cache")}
    return load(name, **{"root": None if root is None else str(root), **rest, **changes})


def idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 or int32 array."""
    code = {1: 0x08, 4: 0x0C}[array.itemsize]
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(f">u{array.itemsize}").tobytes()


def arrays(
    count: int = 40, tests: int = 7, height: int = 32, width: int = 20, classes: int = 26
) -> list[np.ndarray]:
    """Random images, and labels that go round the classes, for training and for testing."""
    rng = np.random.default_rng(0)
    made = []
    for n in (count, tests):
        made.append(rng.integers(0, 256, (n, height, width), np.uint8))
        made.append((np.arange(n) % classes).astype(np.uint8))
    return made


def write(folder: Path, contents: list[np.ndarray], names: tuple[str, ...] = FILES) -> Path:
    """The four files, packed where the name says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(names, contents, strict=True):
        raw = idx(array)
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder


def holds(got: Dataset, contents: list[np.ndarray]) -> bool:
    """Whether train and test are just what `contents` says."""
    train, test = got.train, got.test
    tensors = (train.images[:, 0], train.labels, test.images[:, 0], test.labels)
    return all(map(np.array_equal, tensors, contents))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- the embedded MNIST


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return read("mnist", None)


def test_embedded_mnist_is_the_published_one(mnist: Dataset) -> None:
    assert (len(mnist.train), mnist.val, len(mnist.test)) == (60_000, None, 10_000)
    assert mnist.shape == (1, 28, 28)
    assert mnist.train.images.shape == (60_000, 1, 28, 28)
    assert mnist.train.images.dtype == torch.uint8
    assert mnist.train.labels.dtype == torch.int64
    assert mnist.classes == tuple("0123456789")
    assert (round(mnist.mean, 4), round(mnist.std, 4)) == (0.1307, 0.3081)
    # sha256sum of the four unpacked files, concatenated
    assert mnist.digest == "b2d8f5bf39174ee5ffeefa97e42d673c35432b411bb5d1f74fbbeddae7f1690a"
    assert mnist.source == "embedded"
    assert mnist.preview.labels.tolist()[:10] == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert torch.equal(mnist.preview.images, mnist.train.images[:30])


def test_a_folder_of_mnist_files_is_the_same(mnist: Dataset, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES[:2]:
        (raw / f"{name}.gz").symlink_to(sources.EMBEDDED / f"{name}.gz")
    for name in FILES[2:]:
        (raw / name).write_bytes(gzip.decompress((sources.EMBEDDED / f"{name}.gz").read_bytes()))
    again = read("mnist", tmp_path)
    assert again.digest == mnist.digest
    assert torch.equal(again.test.images, mnist.test.images)
    assert again.source == str(tmp_path)


def _flip_a_bit(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[30_000] ^= 1
    path.unlink()
    path.with_suffix("").write_bytes(raw)


def _flip_a_packed_bit(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _truncate(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1000])


def _swap_train_and_test(folder: Path) -> None:
    train, test = folder / "train-labels-idx1-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"
    train.rename(folder / "aside")
    test.rename(train)
    (folder / "aside").rename(test)


@pytest.mark.parametrize(
    ("embedded", "damage", "fault"),
    [
        (False, _flip_a_bit, "SHA-256"),
        (True, _flip_a_packed_bit, "damaged gzip"),
        (True, _truncate, "damaged gzip"),
        (False, _swap_train_and_test, "SHA-256"),
    ],
)
def test_damaged_mnist_is_refused(
    damage: Callable[[Path], None],
    fault: str,
    embedded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in FILES:
        shutil.copy(sources.EMBEDDED / f"{name}.gz", tmp_path)
    damage(tmp_path)
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path)
    with pytest.raises(ConfigError, match=rf"train-labels-idx1-ubyte.*{fault}"):
        read("mnist", None if embedded else tmp_path)


# ---- one's own IDX files


@pytest.mark.parametrize(
    "names",
    [
        FILES,
        tuple(f"{name}.gz" for name in FILES),
        tuple(name.replace("-idx", ".idx") for name in FILES),
        (*FILES[:2], "test-images.idx3-ubyte.gz", "test-labels-idx1-ubyte"),
    ],
    ids=["plain", "gz", "dotted", "mixed"],
)
def test_idx_folder_in_every_spelling(names: tuple[str, ...], tmp_path: Path) -> None:
    contents = arrays()
    got = read("idx", write(tmp_path, contents, names))
    assert got.shape == (1, 32, 20)
    assert got.classes == tuple(map(str, range(26)))
    assert holds(got, contents)
    assert got.digest == hashlib.sha256(b"".join(map(idx, contents))).hexdigest()
    assert np.isclose(got.mean, (contents[0] / 255).mean(), rtol=1e-12)
    assert np.isclose(got.std, (contents[0] / 255).std(), rtol=1e-12)


def test_classes_are_named_by_the_config(tmp_path: Path) -> None:
    write(tmp_path, arrays(classes=3))
    assert read("idx", tmp_path).classes == ("0", "1", "2")
    assert read("idx", tmp_path, classes=list("abcd")).classes == ("a", "b", "c", "d")
    with pytest.raises(ConfigError, match=r"train-labels.*label 2 at index 2.*from 0 to 1"):
        read("idx", tmp_path, classes=["a", "b"])
    for classes in (["a", "b", "a"], ["a"], ["a", "", "c"], ["a", " ", "c"], ["a\nb", "c", "d"]):
        with pytest.raises(
            ConfigError, match=r"dataset\.classes: .*2 or more names, all different"
        ):
            read("idx", tmp_path, classes=classes)
    with pytest.raises(ConfigError, match=r"dataset\.classes: only for dataset\.name=idx"):
        read("mnist", None, classes=["a", "b"])


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def _a_link_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def _a_folder_as_file(folder: Path) -> None:
    (folder / FILES[3]).unlink()
    (folder / FILES[3]).mkdir()


def _break(index: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        path = folder / FILES[index]
        path.write_bytes(change(path.read_bytes()))

    return broken


def _put(index: int, array: np.ndarray) -> Callable[[Path], None]:
    return _break(index, lambda _: idx(array))


def _gz(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / FILES[0]
    path.with_suffix(".gz").write_bytes(change(gzip.compress(path.read_bytes())))
    path.unlink()


def _forged_gz(folder: Path) -> None:
    """Tiny, but by its header 2**50 bytes, which no computer here can reserve."""
    raw = b"\0\0\x08\x03" + np.array([1 << 20, 1 << 15, 1 << 15], ">u4").tobytes()
    (folder / FILES[0]).unlink()
    (folder / f"{FILES[0]}.gz").write_bytes(gzip.compress(raw))


IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = arrays()
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, r"dataset\.root=.*there is no such folder"),
    "a file": (_a_file, r"dataset\.root=.*is not a folder"),
    "a link to itself": (_a_link_to_itself, r"dataset\.root=.*cannot be read \(Too many levels"),
    "missing": (
        lambda folder: (folder / FILES[3]).unlink(),
        r"missing: t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz or .*test-labels\.idx1",
    ),
    "a folder as file": (_a_folder_as_file, r"missing: t10k-labels-idx1-ubyte or"),
    "empty": (_break(0, lambda raw: b""), r"train-images.*starts with nothing"),
    "text": (_break(0, lambda raw: b"<html>"), r"train-images.*00 00 08 03.*3c 68 74 6d"),
    "other type": (_put(0, IMAGES.astype(np.int32)), r"train-images.*00 00 08 03.*00 00 0c 03"),
    "other dimensions": (_put(0, IMAGES[0]), r"train-images.*00 00 08 03.*00 00 08 02"),
    "labels as images": (_put(0, LABELS), r"train-images.*labels.*mislabelled"),
    "images as labels": (_put(1, IMAGES), r"train-labels.*images.*mislabelled"),
    "cut in the header": (_break(2, lambda raw: raw[:9]), r"t10k-images.*truncated.*header"),
    "cut": (_break(2, lambda raw: raw[:-1]), r"t10k-images.*7x32x20.*4496 bytes.*4495: truncated"),
    "trailing": (_break(3, lambda raw: raw + b"\0"), r"t10k-labels.*15 bytes.*trailing"),
    "cut gz": (lambda f: _gz(f, lambda raw: raw[:-9]), r"train-images.*\.gz: damaged gzip"),
    "no gz": (lambda f: _gz(f, lambda raw: b"x" * 99), r"train-images.*\.gz: not an IDX.*78 78"),
    "bad checksum": (
        lambda f: _gz(f, lambda raw: raw[:-8] + b"\0\0\0\0" + raw[-4:]),
        r"train-images.*\.gz: damaged gzip.*CRC",
    ),
    "forged header": (_forged_gz, r"train-images.*1048576x32768x32768.*has 16: truncated"),
    "no image": (_put(0, IMAGES[:0]), r"train-images.*holds nothing: 0x32x20"),
    "no label": (_put(3, TEST_LABELS[:0]), r"t10k-labels.*holds nothing: 0 by"),
    "no pixel": (_put(2, TEST_IMAGES[:, :0]), r"t10k-images.*holds nothing: 7x0x20"),
    "fewer labels": (_put(1, LABELS[:-1]), r"train-images.*40 images, but 39 labels.*train-labels"),
    "more labels": (_put(3, LABELS), r"t10k-images.*7 images, but 40 labels.*t10k-labels"),
    "other size": (
        _put(2, TEST_IMAGES.transpose(0, 2, 1)),
        r"t10k-images.*20x32 pixels, but 32x20.*train-images",
    ),
    "label out of range": (
        _put(3, np.array([0, 1, 2, 26, 25, 99, 4], np.uint8)),
        r"t10k-labels.*label 26 at index 3: must be from 0 to 25",
    ),
    "one class": (_put(1, LABELS * 0), r"dataset\.classes: '0': must be 2 or more.*train-labels"),
    "constant": (_put(0, IMAGES * 0 + 9), r"train-images.*every pixel .* alike"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=list(BAD_FOLDERS))
def test_bad_idx_folder(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", arrays())
    read("idx", folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        read("idx", folder)


def test_packed_files_are_known_by_their_content(tmp_path: Path) -> None:
    contents = arrays()
    write(tmp_path, contents)
    plain, packed = (tmp_path / name for name in FILES[:2])
    plain.rename(plain.with_suffix(".gz"))
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    assert holds(read("idx", tmp_path), contents)


def test_a_root_whose_name_is_too_long() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root=.*cannot be read \(File name too long\)"):
        read("idx", Path("x" * 5000))


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    write(tmp_path, arrays())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte: cannot be read \(Permission"):
        read("idx", tmp_path)


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.root: missing"):
        read("idx", None)
    with pytest.raises(
        ConfigError, match=r"dataset\.name=kmnits: .*emnist_balanced.*mean kmnist\?"
    ):
        read("kmnits", None)


# ---- the split


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 images, more than are moved at once, of 1 x 2 pixels that spell the image's index; its
    label is the index % 7."""
    index = np.arange(5000)
    images = np.stack([index // 256, index % 256], 1)[:, None].astype(np.uint8)
    labels = (index % 7).astype(np.uint8)
    return write(tmp_path_factory.mktemp("numbered"), [images, labels, images[:9], labels[:9]])


def indices(split: Split | None) -> list[int]:
    """Of the images of a split; and their labels are still theirs."""
    assert split is not None
    high, low = split.images[:, 0, 0].long().unbind(1)
    index = high * 256 + low
    assert torch.equal(index % 7, split.labels)
    return index.tolist()


@pytest.mark.parametrize("val_size", [1, 2500, 4999])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_and_complete(numbered: Path, val_size: int, seed: int) -> None:
    got = read("idx", numbered, val_size=val_size, split_seed=seed)
    train, val = indices(got.train), indices(got.val)
    assert len(val) == val_size
    assert sorted(train + val) == list(range(5000))
    assert train == sorted(train)
    assert val == sorted(val)
    assert indices(got.preview) == list(range(30))
    assert indices(got.test) == list(range(9))


def test_split_depends_on_split_seed_alone(numbered: Path) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(read("idx", numbered, val_size=100, split_seed=5))
        assert torch.equal(before, torch.get_rng_state())
    assert indices(states[0].val) == indices(states[1].val)
    other = read("idx", numbered, val_size=100, split_seed=6)
    assert indices(other.val) != indices(states[0].val)
    # A smaller train split is a part of the larger and leaves validation as it is.
    small = read("idx", numbered, val_size=100, train_size=50, split_seed=5)
    assert indices(small.val) == indices(states[0].val)
    assert len(small.train) == 50
    assert set(indices(small.train)) < set(indices(states[0].train))


def test_split_is_that_of_earlier_releases(numbered: Path) -> None:
    """A record names the split by its seed: another permutation would make old records false."""
    got = read("idx", numbered, val_size=5, train_size=5, split_seed=0)
    assert indices(got.train) == [725, 1044, 1703, 2591, 4111]
    assert indices(got.val) == [368, 756, 1208, 2158, 2256]


def test_without_validation_the_file_is_kept_as_it_is(numbered: Path) -> None:
    assert indices(read("idx", numbered).train) == list(range(5000))
    part = read("idx", numbered, train_size=4999)
    assert part.val is None
    assert len(part.train) == 4999
    assert part.mean != read("idx", numbered).mean


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"val_size": -1}, r"dataset\.val_size=-1: must be from 0 to 4999.*5000"),
        ({"val_size": 5000}, r"dataset\.val_size=5000: must be from 0 to 4999.*5000"),
        ({"train_size": 0}, r"dataset\.train_size=0: must be from 1 to 5000"),
        (
            {"val_size": 100, "train_size": 4901},
            r"dataset\.train_size=4901: must be from 1 to 4900",
        ),
    ],
)
def test_split_bounds(numbered: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read("idx", numbered, **sizes)


# ---- what a Dataset does


def test_normalise(numbered: Path) -> None:
    got = read("idx", numbered)
    before = got.train.images.clone()
    normal = got.normalise(got.train.images[None])
    assert normal.dtype == torch.float32
    assert normal.shape == (1, 5000, 1, 1, 2)
    torch.testing.assert_close(normal[0], (before / 255 - got.mean) / got.std)
    assert abs(normal.mean().item()) < 1e-5
    assert abs(normal.std(correction=0).item() - 1) < 1e-5
    assert torch.equal(got.train.images, before)


@pytest.mark.parametrize("val_size", [0, 3])
def test_to_moves_every_split(numbered: Path, val_size: int) -> None:
    got = read("idx", numbered, val_size=val_size)
    moved = got.to("meta")
    assert (moved.val is None) == (val_size == 0)
    for split in filter(None, (moved.train, moved.val, moved.test, moved.preview)):
        assert split.images.is_meta
        assert split.labels.is_meta
    assert not got.train.images.is_meta


# ---- published archives


def trust(monkeypatch: pytest.MonkeyPatch, name: str, *archives: bytes) -> None:
    """Take the archives for those that were published as `name`."""
    kind = sources.DATASETS[name].kind
    digests = [hashlib.sha256(archive).hexdigest() for archive in archives]
    trusted = dict(zip(sources.SHA256[kind], digests, strict=True))
    monkeypatch.setitem(sources.SHA256, kind, trusted)


def publish(monkeypatch: pytest.MonkeyPatch, name: str, contents: list[np.ndarray]) -> list[bytes]:
    archives = [gzip.compress(idx(array)) for array in contents]
    trust(monkeypatch, name, *archives)
    return archives


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_archives(
    name: str, kind: str, flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = arrays(height=28, width=28, classes=10)
    archives = publish(monkeypatch, name, contents)
    home = tmp_path if flat else tmp_path / kind / "raw"
    write(home, contents, tuple(f"{file}.gz" for file in FILES))
    for file, archive in zip(FILES, archives, strict=True):
        (home / f"{file}.gz").write_bytes(archive)
        (home / file).write_bytes(b"extracted by somebody, and never read")
    got = read(name, tmp_path)
    assert len(got.classes) == 10
    assert np.array_equal(got.train.images[:, 0].numpy(), contents[0])
    assert np.array_equal(got.test.labels.numpy(), contents[3])
    assert got.source == str(tmp_path)
    # The cache is the root where none is given.
    assert read(name, None, cache=tmp_path).digest == got.digest

    (home / "t10k-labels-idx1-ubyte.gz").write_bytes(archives[1])
    with pytest.raises(ConfigError, match=rf"t10k-labels.*not of {name}: its SHA-256 must be"):
        read(name, tmp_path)


def test_archives_that_were_packed_anew_are_accepted_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Debian's package: other headers, the same content."""
    contents = arrays(height=28, width=28, classes=10)
    publish(monkeypatch, "fashion_mnist", contents)
    names = list(sources.SHA256["FashionMNIST"])
    digests = [hashlib.sha256(idx(array)).hexdigest() for array in contents]
    unpacked = dict(zip(names, digests, strict=True))
    monkeypatch.setitem(sources.SHA256, "FashionMNIST-unpacked", unpacked)
    for file, array in zip(names, contents, strict=True):
        (tmp_path / file).write_bytes(gzip.compress(idx(array), 1, mtime=1))
    assert holds(read("fashion_mnist", tmp_path), contents)

    whole = (tmp_path / names[1]).read_bytes()
    for other in (gzip.compress(idx(contents[3]), mtime=1), whole[:-9], b"no archive"):
        (tmp_path / names[1]).write_bytes(other)
        with pytest.raises(ConfigError, match=r"train-labels.*not of fashion_mnist: its SHA-256"):
            read("fashion_mnist", tmp_path)


def test_qmnist_label_is_column_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, test_images, test_labels = arrays(classes=10)
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 1 << 30, (len(y), 8), np.int32) for y in (labels, test_labels)]
    columns[0][:, 0], columns[1][:, 0] = labels, test_labels
    archives = publish(monkeypatch, "qmnist", [images, columns[0], test_images, columns[1]])
    for file, archive in zip(sources.SHA256["QMNIST"], archives, strict=True):
        (tmp_path / file).write_bytes(archive)
    got = read("qmnist", tmp_path)
    assert np.array_equal(got.train.labels.numpy(), labels)
    assert np.array_equal(got.test.labels.numpy(), test_labels)
    assert np.array_equal(got.test.images[:, 0].numpy(), test_images)


@pytest.mark.parametrize(
    ("name", "count", "named"),
    [
        ("emnist_letters", 26, {0: "A", 25: "Z"}),
        ("emnist_balanced", 47, {0: "0", 10: "A", 35: "Z", 36: "a", 38: "d", 46: "t"}),
        ("emnist_digits", 10, {0: "0", 9: "9"}),
    ],
)
def test_emnist_is_upright_and_labelled_from_0(
    name: str, count: int, named: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = arrays(5000, height=6, width=6, classes=count)
    shift = 1 if name == "emnist_letters" else 0
    stored = [np.swapaxes(x, 1, 2) if x.ndim == 3 else x + np.uint8(shift) for x in contents]
    bundle = io.BytesIO()
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("gzip/emnist-byclass-mapping.txt", "of no concern")
        for file, array in zip(sources.DATASETS[name].members, stored, strict=True):
            archive.writestr(file, gzip.compress(idx(array)))
    trust(monkeypatch, name, bundle.getvalue())
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "gzip.zip").write_bytes(bundle.getvalue())

    got = read(name, tmp_path)
    assert len(got.classes) == count
    assert {i: got.classes[i] for i in named} == named
    assert holds(got, contents)

    (raw / "gzip.zip").write_bytes(bundle.getvalue()[:-1])
    with pytest.raises(ConfigError, match=r"gzip\.zip: damaged.*SHA-256"):
        read(name, tmp_path)


# ---- downloads


@pytest.mark.parametrize("name", [name for name in sources.DATASETS if name != "mnist"])
def test_no_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = sources.DATASETS[name].kind
    archives = list(sources.SHA256[kind])

    def fail(url: str) -> None:
        assert url.startswith("http")
        assert url.endswith(f"/{archives[0]}")
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(sources, "open_url", fail)
    with pytest.raises(ConfigError) as caught:
        read(name, None, cache=tmp_path / "cache")
    home = tmp_path / "cache" / kind / "raw"
    for part in (
        f"dataset.name={name}",
        "Network is unreachable",
        f"put {', '.join(archives)} into {home}",
        "dataset.root=FOLDER",
    ):
        assert part in str(caught.value)
    assert everything_below(tmp_path) == [home / ".download.lock"]


def test_waiting_for_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ANSWER_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(OSError, match=r"timed out|no answer"):
            sources.open_url(f"http://127.0.0.1:{port}/")
    with pytest.raises(OSError, match=r"^\[Errno \d+\] Connection refused$"):  # closed by now
        sources.open_url(f"http://127.0.0.1:{port}/")
    # A name server that does not answer is not subject to the timeout of sockets.
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, timeout: time.sleep(1))
    with pytest.raises(TimeoutError, match="no answer"):
        sources.open_url("http://example.invalid/")


@dataclass
class Mirror:
    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)  # the names of the files asked for
    whole: threading.Event = field(default_factory=threading.Event)  # the last byte waits for it
    cut: bool = False  # the last byte is never sent

    def publish(self, monkeypatch: pytest.MonkeyPatch, contents: list[np.ndarray]) -> None:
        for file, archive in zip(FILES, publish(monkeypatch, "kmnist", contents), strict=True):
            (self.folder / f"{file}.gz").write_bytes(archive)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A folder, served in the place of KMNIST's mirror."""
    made = Mirror(tmp_path / "mirror")
    made.folder.mkdir()
    made.whole.set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            made.requests.append(self.path.removeprefix("/"))
            super().do_GET()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            content = source.read()
            with contextlib.suppress(ConnectionError):  # of who was killed
                outputfile.write(content[:-1])
                made.whole.wait()
                outputfile.write(b"" if made.cut else content[-1:])

    handler = functools.partial(Handler, directory=made.folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        made.url = f"http://127.0.0.1:{server.server_port}/"
        spec = replace(sources.DATASETS["kmnist"], url=made.url)
        monkeypatch.setitem(sources.DATASETS, "kmnist", spec)
        yield made
        made.whole.set()
        server.shutdown()
        thread.join()


def test_download_once(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = arrays(classes=10)
    mirror.publish(monkeypatch, contents)
    home = tmp_path / "cache" / "KMNIST" / "raw"
    archives = sorted(f"{file}.gz" for file in FILES)
    got = read("kmnist", None, cache=tmp_path / "cache")
    assert holds(got, contents)
    assert sorted(mirror.requests) == archives
    assert sorted(path.name for path in home.iterdir()) == [".download.lock", *archives]

    # What is there is only read: with no request, no lock, and no right to write.
    (home / ".download.lock").unlink()
    home.chmod(0o555)
    assert read("kmnist", None, cache=tmp_path / "cache").digest == got.digest
    home.chmod(0o755)
    assert len(mirror.requests) == 4
    assert sorted(path.name for path in home.iterdir()) == archives


def fetch(spec: sources.DatasetSpec, sha256: dict[str, str], cache: Path) -> list[np.ndarray]:
    """In a process of its own: KMNIST as it is published by `spec`. Train, then test."""
    sources.DATASETS["kmnist"], sources.SHA256["KMNIST"] = spec, sha256
    cache.with_name(f"{os.getpid()}.ready").touch()
    got = read("kmnist", None, cache=cache)
    return [x.numpy() for part in (got.train, got.test) for x in (part.images[:, 0], part.labels)]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Forks of a process that has imported what takes seconds, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_exp.data.dataset"])
    return context


def test_eight_processes_download_once(
    mirror: Mirror, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = arrays(classes=10)
    mirror.publish(monkeypatch, contents)
    asked = sources.DATASETS["kmnist"], sources.SHA256["KMNIST"], tmp_path / "cache"
    mirror.whole.clear()
    with ProcessPoolExecutor(8, processes) as pool:
        found = [pool.submit(fetch, *asked) for _ in range(8)]
        try:
            wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 8)
            time.sleep(0.5)  # all of them need the file that is on its way
        finally:
            mirror.whole.set()
        for one in found:
            assert all(map(np.array_equal, one.result(timeout=60), contents))
    assert sorted(mirror.requests) == sorted(f"{file}.gz" for file in FILES)


@contextlib.contextmanager
def killed_halfway(mirror: Mirror, processes: Any, cache: Path) -> Iterator[None]:
    """Where another process is in the middle of a download. At the end it is killed there."""
    home = cache / "KMNIST" / "raw"
    mirror.whole.clear()
    asked = sources.DATASETS["kmnist"], sources.SHA256["KMNIST"], cache
    process = processes.Process(target=fetch, args=asked)
    process.start()
    try:
        wait_until(lambda: any(path.stat().st_size for path in home.glob(".download-*/*")))
        yield
    finally:
        process.kill()
        process.join()
        mirror.whole.set()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_download_is_done_again(
    mirror: Mirror, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = arrays(2500, classes=10)  # more than is written at once
    mirror.publish(monkeypatch, contents)
    home = tmp_path / "cache" / "KMNIST" / "raw"
    with killed_halfway(mirror, processes, tmp_path / "cache"):
        pass
    assert {path.name[:10] for path in home.iterdir()} == {".download.", ".download-"}

    assert holds(read("kmnist", None, cache=tmp_path / "cache"), contents)
    assert list(home.glob(".download-*")) == []
    assert mirror.requests == [f"{file}.gz" for file in (FILES[0], *FILES)]


def test_who_waits_for_a_killed_download_does_it(
    mirror: Mirror,
    processes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    contents = arrays(2500, classes=10)
    mirror.publish(monkeypatch, contents)
    monkeypatch.setattr(sources, "WAIT_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "mnist_exp")
    home = tmp_path / "cache" / "KMNIST" / "raw"
    with ThreadPoolExecutor() as pool:
        with killed_halfway(mirror, processes, tmp_path / "cache"):
            waiting = pool.submit(read, "kmnist", None, cache=tmp_path / "cache")
            wait_until(lambda: bool(caplog.messages))
            time.sleep(0.3)  # time enough to say it again, or to download as well
            assert mirror.requests == [f"{FILES[0]}.gz"]
        assert holds(waiting.result(timeout=30), contents)
    assert caplog.messages == [
        f"waiting for {FILES[0]}.gz: another process is downloading to {home}",
        *(f"downloading {mirror.url}{file}.gz to {home}" for file in FILES),
    ]
    assert list(home.glob(".download-*")) == []


def test_waiting_for_another_process_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    contents = arrays(classes=10)
    archives = publish(monkeypatch, "kmnist", contents)
    monkeypatch.setattr(sources, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(sources, "open_url", lambda url: pytest.fail(f"asked for {url}"))
    caplog.set_level(logging.INFO, "mnist_exp")
    home = tmp_path / "KMNIST" / "raw"
    home.mkdir(parents=True)
    lock = FileLock(home / ".download.lock")
    with ThreadPoolExecutor() as pool:
        with lock:
            waiting = pool.submit(read, "kmnist", None, cache=tmp_path)
            wait_until(lambda: bool(caplog.messages))
            for file, archive in zip(FILES, archives, strict=True):
                (home / f"{file}.gz").write_bytes(archive)
        assert holds(waiting.result(timeout=30), contents)
    assert caplog.messages == [
        f"waiting for {FILES[0]}.gz: another process is downloading to {home}"
    ]


def _flipped(archive: bytes) -> bytes:
    return archive[:100] + bytes([archive[100] ^ 1]) + archive[101:]


@pytest.mark.parametrize(
    ("damage", "cut"),
    [(_flipped, False), (lambda archive: archive[:-1], False), (lambda archive: archive, True)],
    ids=["altered", "short", "cut off"],
)
def test_altered_download_leaves_nothing(
    damage: Callable[[bytes], bytes],
    cut: bool,
    mirror: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror.publish(monkeypatch, arrays(classes=10))
    mirror.cut = cut
    path = mirror.folder / f"{FILES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    home = tmp_path / "cache" / "KMNIST" / "raw"
    with pytest.raises(ConfigError, match=r"train-images.*(incomplete or altered|IncompleteRead)"):
        read("kmnist", None, cache=tmp_path / "cache")
    assert list(home.iterdir()) == [home / ".download.lock"]
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-images.*404"):
        read("kmnist", None, cache=tmp_path / "cache")
    assert list(home.iterdir()) == [home / ".download.lock"]


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\nthe first bytes",
    ],
    ids=["not HTTP", "cut in a chunk"],
)
def test_broken_answer_leaves_nothing(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def reply(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        server.settimeout(30)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        spec = replace(sources.DATASETS["kmnist"], url=url)
        monkeypatch.setitem(sources.DATASETS, "kmnist", spec)
        replied = pool.submit(reply, server)
        with pytest.raises(ConfigError, match=r"train-images.*cannot be downloaded from.*by hand"):
            read("kmnist", None, cache=tmp_path)
        replied.result()
    assert everything_below(tmp_path) == [tmp_path / "KMNIST" / "raw" / ".download.lock"]


@pytest.mark.parametrize(
    ("fault", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (TimeoutError("timed out"), ConfigError)],
)
def test_interrupted_download_leaves_nothing(
    fault: BaseException,
    raised: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Response(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if block := super().read(size):
                return block
            assert list(tmp_path.rglob(".download-*/*"))  # the part so far
            raise fault

    monkeypatch.setattr(sources, "open_url", lambda url: Response(b"the first bytes"))
    with pytest.raises(raised):
        read("kmnist", None, cache=tmp_path)
    home = tmp_path / "KMNIST" / "raw"
    assert list(home.iterdir()) == [home / ".download.lock"]


def _a_file_for_a_folder(cache: Path) -> None:
    cache.mkdir()
    (cache / "KMNIST").touch()


def _a_folder_for_the_lock(cache: Path) -> None:
    (cache / "KMNIST" / "raw" / ".download.lock").mkdir(parents=True)


def _read_only(cache: Path) -> None:
    cache.mkdir(mode=0o555)


def _read_only_below(cache: Path) -> None:
    cache.joinpath("KMNIST").mkdir(parents=True)
    cache.joinpath("KMNIST", "raw").mkdir(mode=0o555)


not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (Path.touch, "Not a directory|File exists"),
        (_a_file_for_a_folder, "Not a directory|File exists"),
        (_a_folder_for_the_lock, "Is a directory"),
        pytest.param(_read_only, "Permission denied", marks=not_root),
        pytest.param(_read_only_below, "Permission denied", marks=not_root),
    ],
)
def test_no_folder_to_download_to(
    spoil: Callable[[Path], None], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "open_url", lambda url: pytest.fail(f"asked for {url}"))
    spoil(tmp_path / "cache")
    with pytest.raises(ConfigError, match=rf"dataset\.name=kmnist: .*({fault}).*dataset\.root="):
        read("kmnist", None, cache=tmp_path / "cache")
