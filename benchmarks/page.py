"""benchmarks/RESULTS.md, of which `make bench` writes the one part and `make torture` the other."""

from pathlib import Path

_TORTURE = "\n## Torture\n"


def write_measurements(path: Path, text: str) -> None:
    """Write what was measured, and leave the faults' part as it is."""
    _write(path, text.rstrip() + "\n", _parts(path)[1])


def write_torture(path: Path, text: str) -> None:
    """Write the faults' part, and leave what was measured as it is."""
    _write(path, _parts(path)[0], f"\n{text.strip()}\n")


def _parts(path: Path) -> tuple[str, str]:
    first, _, second = (path.read_text() if path.exists() else "").partition(_TORTURE)
    return first, second


def _write(path: Path, first: str, second: str) -> None:
    path.write_text(first + (_TORTURE + second if second else ""))
