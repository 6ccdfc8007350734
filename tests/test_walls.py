"""Imports point one way: read from the source, those inside functions included."""

import ast
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "mnist_exp"
PLUGIN = ROOT / "hydra_plugins" / "mnist_exp_sweep.py"
SOURCES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}


def imported(source: str, everywhere: bool = True) -> set[str]:
    """Dotted names of what a module imports: `from a import b` gives a and a.b.

    everywhere=False: only what runs when the module is imported.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not expected here"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        never = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if everywhere or not (later or never):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return found


def libraries(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(SOURCES[module].read_text())}


def own(module: str) -> set[str]:
    """The modules of the package that are imported together with `module`."""
    found = imported(SOURCES[module].read_text(), everywhere=False)
    return {name.split(".")[1] for name in found if name.startswith("mnist_exp.")} & set(SOURCES)


def importers(library: str) -> set[str]:
    return {module for module in SOURCES if library in libraries(module)}


def test_reading() -> None:
    source = """
import a.b, c
from d import e
if TYPE_CHECKING:
    import f
class G:
    import h
    def i(self):
        import j
try:
    import k
except ImportError:
    pass
"""
    at_once = {"a.b", "c", "d", "d.e", "h", "k"}
    assert imported(source, everywhere=False) == at_once
    assert imported(source) == at_once | {"f", "j"}


def test_one_module_knows_mlflow() -> None:
    assert importers("mlflow") == {"tracking"}


def test_one_module_knows_matplotlib() -> None:
    assert importers("matplotlib") == {"plots"}


def test_hydra_stays_at_the_edge() -> None:
    edge = {"config", "verbs", "grid", "sweep", "stacked"}
    assert {"config", "verbs"} <= importers("hydra") <= edge


def reached(module: str) -> set[str]:
    """The modules of the package that are imported with `module`, directly or not, and itself."""
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = {other for each in waiting for other in own(each)} - found
    return found


@pytest.mark.parametrize(
    "module",
    ["training", "step", "stack", "optim", "models", "metrics", "data", "checkpoint", "errors"],
)
def test_the_core_knows_none_of_them(module: str) -> None:
    unwanted = {"hydra", "omegaconf", "mlflow", "matplotlib", "rich"}
    assert [each for each in reached(module) if libraries(each) & unwanted] == []


def test_a_report_is_made_of_numbers_alone() -> None:
    assert "numpy" in libraries("report")  # else nothing was read
    assert libraries("report") <= {*sys.stdlib_module_names, "numpy", "omegaconf"}


def test_what_hydra_imports_at_every_start_is_light() -> None:
    at_once = imported(PLUGIN.read_text(), everywhere=False)
    assert "hydra.plugins.launcher" in at_once  # else nothing was read
    light = {*sys.stdlib_module_names, "hydra", "omegaconf"}
    assert {name.split(".")[0] for name in at_once} <= light


def test_no_circles() -> None:
    waiting = {module: own(module) for module in SOURCES}
    assert "training" in waiting["run"]  # else nothing was read
    while ready := [m for m, needs in waiting.items() if not needs & set(waiting)]:
        for module in ready:
            del waiting[module]
    assert waiting == {}


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
def test_documented(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
