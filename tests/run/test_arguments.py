"""An argument is refused where a signature or a default tells that it cannot be taken."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import pytest
from torch import Tensor, nn

from mnist_exp.errors import ConfigError
from mnist_exp.run.arguments import check_arguments


class Net:
    def __init__(  # type: ignore[no-untyped-def]
        self,
        width: int = 8,
        sizes: Sequence[int] = (8, 8),
        pair: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        kernel: int | tuple[int, ...] = 3,
        padding: str | int = 0,
        mode: Literal["mean", "sum"] = "mean",
        flag: bool = False,
        share: float | None = 0.5,
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013
        layer: nn.Module | None = None,
        function: Callable[[int], int] = abs,
        text: str = "a",
        annotated: Annotated[str, []] = "a",
        written: "int" = 1,
        unknown: "NotThere" = 1.0,  # type: ignore[name-defined]  # noqa: F821
        by_default=0.1,
        list_by_default=(1, 2),
        flag_by_default=True,
        anything=None,
    ) -> None: ...


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("width", [3]),
        ("sizes", [[], [1], [1, 2, 3]]),
        ("pair", [[0, 1.0]]),
        ("kernel", [3, [3], [3, 5]]),
        ("padding", ["same", 1]),
        ("mode", ["sum"]),
        ("flag", [True]),
        ("share", [None, 1, 0.1]),
        ("implicit", [None, 1]),
        ("layer", [None, {"_target_": "torch.nn.ReLU"}]),
        ("function", ["what no signature tells"]),
        ("text", ["", "1"]),
        ("annotated", ["a", 1]),
        ("unknown", [2, None]),
        ("by_default", [None, 1, 2.5]),
        ("list_by_default", [[], [0.5]]),
        ("flag_by_default", [False]),
        ("anything", [None, 1, "a", [[]], {"a": 1}]),
    ],
)
def test_what_may_be_taken(argument: str, values: list[Any]) -> None:
    for value in values:
        check_arguments("model", Net, {argument: value})


@pytest.mark.parametrize(
    ("argument", "expected", "values"),
    [
        ("width", "a whole number, as its default 8", [3.0, "3", None, True, [3], {}]),
        ("sizes", "a list of whole numbers, as its default [8, 8]", [8, [8.5], ["a"], "88", None]),
        ("pair", "a list of 2 numbers, as its default [0.9, 0.99]", [[1], [1, 2, 3], ["a", 1], 1]),
        ("kernel", "a whole number or a list of whole numbers", [2.5, "three", [3, "a"]]),
        ("padding", "text or a whole number", [None, [1]]),
        ("mode", "mean, sum, as its default mean", ["max", 1]),
        ("flag", "true or false, as its default false", ["yes", 1, None]),
        ("share", "a number or null", ["half", True]),
        ("implicit", "a whole number", ["a"]),
        ("text", "text", [1, None]),
        ("by_default", "a number or null, as its default 0.1", ["a", True, [1]]),
        ("list_by_default", "a list of numbers, as its default [1, 2]", [1, ["a"]]),
        ("flag_by_default", "true or false", [1, "true"]),
        ("unknown", "a number or null, as its default 1.0", ["a"]),
    ],
)
def test_what_cannot_be_taken(argument: str, expected: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^model\.{argument}=.*: must be ") as caught:
            check_arguments("model", Net, {argument: value})
        assert f"must be {expected}" in str(caught.value)
