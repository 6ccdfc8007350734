"""What import contracts in pyproject.toml cannot say: private parts of libraries, and start-up."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "mnist_exp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# each private part of another library, and the one file that may know it
PRIVATE = {
    "hydra._internal": {"config/hydra_adapter.py"},
    "torch._inductor": {"training/compile.py"},
}


def imported(source: str) -> set[str]:
    """Return the dotted names that a module imports, at its top or in its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not expected here"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_imported_finds_imports_in_functions() -> None:
    source = "import a.b\ndef f():\n    from c import d, e\n"
    assert imported(source) == {"a.b", "c.d", "c.e"}


def test_each_private_part_of_a_library_is_in_one_file() -> None:
    found = defaultdict(set)
    for path in SOURCES:
        for name in imported(path.read_text()):
            parts = name.split(".")
            private = [i for i, part in enumerate(parts) if part.startswith("_") and part[1] != "_"]
            if private and parts[0] not in ("mnist_exp", "_typeshed"):
                found[".".join(parts[: private[0] + 1])].add(str(path.relative_to(PACKAGE)))
    assert found == PRIVATE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_command_line_starts_without_what_is_heavy() -> None:
    program = (
        "import sys\nfrom mnist_exp.cli import main\n"
        "heavy = {'torch', 'mlflow', 'matplotlib', 'hydra', 'numpy', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
