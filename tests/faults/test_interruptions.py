"""The faults' own patches: one by a name that has moved would replace nothing, and say nothing."""

from pathlib import Path
from types import CodeType, ModuleType

import pytest

from tests.faults import interruptions
from tests.faults.interruptions import WAITS, reference, reference_sweep, replaced_calls


def names_read(code: CodeType) -> set[str]:
    """Return the global names that a function and those in it read."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names_read, nested))


def names_in_functions(source: str) -> set[str]:
    module = compile(source, "a module", "exec")
    functions = [constant for constant in module.co_consts if isinstance(constant, CodeType)]
    return set().union(*map(names_read, functions))


def test_each_replaced_function_is_called(tmp_path: Path) -> None:
    reference(tmp_path)
    reference_sweep(tmp_path)
    replaced = interruptions.replacements(tmp_path)
    assert replaced_calls(tmp_path) == {f"{module.__name__}.{name}" for module, name, _ in replaced}


@pytest.mark.parametrize("module, name", [wait[:2] for wait in WAITS])
def test_each_changed_constant_is_read_in_its_module(module: ModuleType, name: str) -> None:
    assert isinstance(getattr(module, name), float) and module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert name in names_in_functions(source)
