"""Journals that are damaged."""

import math
import random
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import Entry, Journal, read

# values that a format could spoil
ODD: list[Any] = [
    *(0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf, 2**200, True),
    *("", "Größe 数字 🎲", "line\nbreak\r\u2028\u0085\0\x1f", '"}\\', ', "crc": "00000000"}'),
    *("\udcff not UTF-8", [], {}, [None, [1, {"a": {"": []}}]], "x" * 100_000),
]


def comparable(entries: Sequence[Entry]) -> list[str]:
    """Return what can be compared of entries: a nan does not equal itself, and 0.0 equals -0.0."""
    return [repr((entry.time, entry.kind, entry.fields)) for entry in entries]


def write_all(folder: Path, values: Sequence[Any]) -> list[Entry]:
    """Write values to the journal in `folder`, an entry each, and read them back."""
    with closing(Journal(folder)) as written:
        for i, value in enumerate(values):
            written.write("value", i=i, value=value)
    return read(folder)[0]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return `content` cut short, with a bit flipped, or with up to four bytes replaced.

    A CRC-32 sees that many for sure.
    """
    place = rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            return content[:place]
        case 1:
            new = bytes([content[place] ^ 1 << rng.randrange(8)])
        case 2:
            new = rng.choice([b"\n", b"\n\n", b"\0\0", b"\xff", b'"}\n{'])
        case _:
            new = rng.randbytes(4)
    return content[:place] + new + content[place + len(new) :]


def damage_is_reported(folder: Path, seed: int) -> None:
    """Damage a journal, and assert that what is untouched is read and all else is reported."""
    rng = random.Random(seed)
    values = [value for value in ODD if len(str(value)) < 1000]
    entries = write_all(folder, rng.sample(values, len(values)))
    path = folder / journal.NAME
    before = path.read_bytes()
    after = damaged(before, rng)
    path.write_bytes(after)

    untouched = []
    for entry, last in zip(entries, [0, *(entry.end for entry in entries)], strict=False):
        line = slice(max(0, last - 1), entry.end)  # with both its newlines
        if before[line] == after[line]:
            untouched.append(entry)
    found, problems = read(folder)
    assert comparable(found) == comparable(untouched)
    assert len(found) + len(problems) == after.count(b"\n")
    for problem in problems:
        begin, end = map(int, re.findall(r"from byte (\d+) to (\d+): ", problem)[0])
        assert problem.startswith(f"{path}: damaged, ")
        assert after[begin:end].find(b"\n") == end - begin - 1

    with closing(Journal(folder)) as written:
        written.write("later")
    again, same = read(folder)
    assert (comparable(again[:-1]), again[-1].kind, same) == (comparable(found), "later", problems)
