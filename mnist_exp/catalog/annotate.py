"""Notes and tags that a person gives to a run on record, in MLflow's own fields."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError
from mnist_exp.tracking import journal, waiting
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.limits import (
    TAG_LENGTH,
    check_tag,
    is_reserved,
    length_problem,
    shortened,
)
from mnist_exp.tracking.notes import DESCRIPTION, NOTE, described_with, own_description
from mnist_exp.tracking.run_log import OpenRuns, add_tags
from mnist_exp.tracking.store import Store

Tags = Mapping[str, str]


@dataclass(frozen=True)
class Annotated:
    """A run that has been given a note or tags."""

    id: str
    name: str
    note: str
    tags: Tags  # those that a person has given it
    waits: str = ""  # why MLflow does not have the change yet


def annotated(record: Record, tags: Tags | None = None, waits: str = "") -> Annotated:
    """Return the note and the tags of a record. `tags`: all of them, if not the record's own."""
    found = record.tags if tags is None else tags
    given = {key: value for key, value in found.items() if not is_reserved(key)}
    return Annotated(record.id, record.name, found.get(NOTE, ""), given, waits)


def set_note(record: Record, text: str, uri: str, open_runs: OpenRuns) -> Annotated:
    """Give a run a note, which its description in MLflow begins with; "" removes it.

    Args:
        record: The run.
        text: The note.
        uri: The store that has it.
        open_runs: The registry of the runs that their stores do not have whole.

    Raises:
        ConfigError: The note is too long, or the store refuses it.
    """
    text = text.strip()

    def change(tags: Tags) -> Tags:
        content = described_with(text, own_description(tags))
        if text and (problem := length_problem(content, TAG_LENGTH)):
            raise ConfigError(
                f"the note {shortened(text)!r}: with the description that follows it, {problem}"
            )
        return {NOTE: text, DESCRIPTION: content}

    return _change(record, change, uri, open_runs)


def set_tags(record: Record, tags: Tags, uri: str, open_runs: OpenRuns) -> Annotated:
    """Give a run tags, in place of those of the same names.

    Args:
        record: The run.
        tags: The tags.
        uri: The store that has it.
        open_runs: The registry of the runs that their stores do not have whole.

    Raises:
        ConfigError: A name or a value cannot be given, or the store refuses it.
    """
    for key, value in tags.items():
        check_tag(key, key, value)
    return _change(record, lambda _: tags, uri, open_runs)


def _change(
    record: Record, change: Callable[[Tags], Tags], uri: str, open_runs: OpenRuns
) -> Annotated:
    """Change tags of a run, in its journal if that is here, otherwise in the store.

    `change` returns the tags to set for all that the run has.
    """
    folder = _folder_here(record, uri)
    if folder is None:
        new = change(record.tags)
        Store(uri).set_tags(record.id, new)
        return annotated(record, {**record.tags, **new})
    # what was edited in MLflow is newer than the journal, once MLflow has all of that
    edited = {} if record.open_run else record.tags
    try:
        new = add_tags(folder, open_runs, lambda tags: change({**tags, **edited}))
    except OSError as error:
        raise ConfigError(
            f"{folder}: the record of the run, or the registry of open runs, cannot be written "
            f"({error.strerror or error}). Make them writable, and type the same again"
        ) from error
    waits = ""
    # the process that trains it delivers it, unless that has ended meanwhile
    if not record.is_at_work or RunHistory.of(folder).status:
        _, problems = waiting.deliver(open_runs, [folder])
        waits = problems.get(folder, "")
    return annotated(record, {**record.tags, **new}, waits)


def _folder_here(record: Record, uri: str) -> Path | None:
    """Return the folder with the journal of a run, if that is on this machine."""
    folder = record.folder
    if not record.key or folder is None or not (folder / journal.NAME).is_file():
        return None
    history = RunHistory.of(folder)
    return folder if (history.key, history.uri) == (record.key, uri) else None
