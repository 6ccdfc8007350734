"""The note of a run in MLflow's own field, the description, which has more than the note in it.

A note is kept as it is in a tag. The description begins with it; what the program itself describes,
as the command that trains a run again, follows after an empty line.
"""

from collections.abc import Mapping

NOTE = "note"  # the tag of the plain text
DESCRIPTION = "mlflow.note.content"  # the tag that MLflow's UI shows as a run's description


def own_description(tags: Mapping[str, str]) -> str:
    """Return the description of a run without the note in front of it."""
    note, content = tags.get(NOTE, ""), tags.get(DESCRIPTION, "")
    if note and (content == note or content.startswith(f"{note}\n\n")):
        return content[len(note) :].removeprefix("\n\n")
    return content


def described_with(note: str, description: str) -> str:
    """Return a description that begins with a note."""
    return "\n\n".join(filter(None, (note, description)))
