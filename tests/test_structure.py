"""What keeps the package easy to find one's way in, beside the linter and the import contracts.

Private parts of libraries, sizes, and what may be imported when the command line starts.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "mnist_exp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FUNCTION_LINES, FILE_LINES, PACKAGE_LINES = 60, 430, 21_850
LONG_FILES: set[str] = set()
# each private part of another library, and the one file that may know it
PRIVATE = {
    "hydra._internal": {"config/hydra_adapter.py"},
    "torch._inductor": {"training/compile.py"},
    "torch.utils._python_dispatch": {"training/trace.py"},
}


def file_name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Return the functions and methods of the package, nested ones included, with their files."""
    nodes = [(file_name(p), node) for p in SOURCES for node in ast.walk(ast.parse(p.read_text()))]
    return [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]


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
                found[".".join(parts[: private[0] + 1])].add(file_name(path))
    assert found == PRIVATE


@pytest.mark.parametrize("path", SOURCES, ids=file_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_function_is_long() -> None:
    long = {
        f"{name}: {function.name}"
        for name, function in functions()
        if (function.end_lineno or 0) - function.lineno >= FUNCTION_LINES
    }
    assert long == set()


def test_no_file_is_long() -> None:
    lines = {file_name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name for name, count in lines.items() if count > FILE_LINES} <= LONG_FILES
    assert sum(lines.values()) <= PACKAGE_LINES


def test_what_was_found_has_a_type() -> None:
    """An entity of a store had none, and each reader had to guess what it can be asked."""
    untyped = {
        f"{name}: {function.name}"
        for name, function in functions()
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.arg == "found" and argument.annotation is not None
        if ast.unparse(argument.annotation) == "Any"
    }
    assert untyped == set()


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("cli.main", {"torch", "mlflow", "matplotlib", "hydra", "numpy", "rich"}),
        ("run.predict", {"mlflow", "matplotlib", "torch._dynamo"}),
        ("run.train", {"mlflow", "torch._dynamo"}),
        ("sweeps.report_files", {"torch", "mlflow"}),
    ],
)
def test_what_is_heavy_is_imported_where_it_is_needed(module: str, heavy: set[str]) -> None:
    program = f"import sys\nimport mnist_exp.{module}\nprint(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
