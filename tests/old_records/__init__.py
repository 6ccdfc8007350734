"""Runs and sweeps that were recorded before 0.1.0, packed, for a test that goes on with them.

What a person has in a checkout: `outputs/`, `mlruns/`, `mlflow.db`, and a module with a model of
their own. Commit 2d5aef0 recorded it, with 320 training and 200 validation images of MNIST:

| folder in `outputs/` | |
| --- | --- |
| `finished` | a run of 3 epochs, with its model in MLflow |
| `pickled` | a run of 2 epochs with the model in `my_net.py`, which cannot be exported |
| `waiting` | a run of 2 epochs whose record has not reached MLflow: no server answered |
| `killed` | the run `finished`, killed with SIGKILL after 2 of its epochs |
| `sweeps/finished` | 2 learning rates x 2 seeds, 2 epochs |
| `sweeps/killed` | 2 learning rates x 2 batch sizes, killed in epoch 3 of its first stack |

Where the paths of the machine and its name stood, the packed files have placeholders, which
`unpack` fills in.
"""

import contextlib
import sqlite3
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

ARCHIVE = Path(__file__).with_name("records.tar.xz")
FOLDER, HOST = "/@FOLDER@", "@HOST@"
_TEXT = {".json", ".jsonl", ".yaml", ".log", ".md", ".csv", ""}


def unpack(folder: Path, host: str, uris: Mapping[str, str]) -> None:
    """Unpacks the records into an empty folder.

    Args:
        folder: Where they are to be found; it stands in for the checkout that they were made in.
        host: The name of the machine that they are to come from.
        uris: Addresses of tracking servers, each with the one that takes its place.
    """
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    replace_in_records(folder, {FOLDER: str(folder), HOST: host, **uris})


def replace_in_records(folder: Path, replacements: Mapping[str, str]) -> None:
    """Replaces texts in every file that holds text, and in the store."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.suffix not in _TEXT:
            continue
        content = path.read_bytes()
        if path.name == "journal.jsonl":
            lines = content.splitlines(keepends=True)
            path.write_bytes(b"".join(_replaced_entry(line, replacements) for line in lines))
        else:
            path.write_bytes(_replaced(content, replacements))
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        for table in [name for (name,) in store.execute(query)]:
            for column in [row[1] for row in store.execute(f"PRAGMA table_info({table})")]:
                for old, new in replacements.items():
                    store.execute(
                        f'UPDATE {table} SET "{column}" = replace("{column}", ?, ?) '
                        f'WHERE instr("{column}", ?)',
                        (old, new, old),
                    )


def _replaced(content: bytes, replacements: Mapping[str, str]) -> bytes:
    for old, new in replacements.items():
        content = content.replace(old.encode(), new.encode())
    return content


def _replaced_entry(line: bytes, replacements: Mapping[str, str]) -> bytes:
    """Replaces texts in a line of a journal, which ends with the checksum of what is before it."""
    body = _replaced(line[: -len(b', "crc": "01234567"}\n')], replacements) + b"}"
    return body[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(body)
