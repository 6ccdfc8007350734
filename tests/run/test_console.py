"""Tables on narrow terminals."""

import io

import pytest
from rich.cells import cell_len

from mnist_exp.run.console import Terminal

HEADER = ("id", "name", "val", "differs in")
ROWS = [
    ("12345678", "a long name of a run", "97.31%", "patience=3 momentum=0.9"),
    ("9", "b", "", ""),
]


@pytest.mark.parametrize("width", [30, 40, 60, 100])
def test_a_row_is_a_line(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.console.width = width
    terminal.console.file = file = io.StringIO()
    terminal.table("", HEADER, ROWS, cut=("name", "differs in"))
    lines = [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]
    if width <= 40:
        assert lines.pop() == "no room for: differs in"
    assert len(lines) == 2 + len(ROWS) and max(map(cell_len, lines)) <= width
    assert all(text in lines[2] for text in ("12345678", "97.31%"))  # these are never cut
    assert ("patience=3 momentum=0.9" in lines[2]) == (width == 100)
    assert ("differs in" in lines[0]) == (width > 40)  # it goes where there is no room
