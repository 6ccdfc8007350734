"""Bad input with its message, beside the nearest thing that is fine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.run.job import Job

Prepare = Callable[..., Job]  # the fixture `prepare`
NO_ARGUMENTS = ["~model.hidden", "~model.dropout"]  # of the default model


@dataclass
class Bad:
    words: Sequence[str]
    message: Sequence[str]  # all of these are in it
    good: Sequence[str]  # the nearest thing that is fine
    real: bool = False  # needs the real data set
    without: str | None = None  # is not in the message


def bad(
    words: str, *message: str, good: str, real: bool = False, without: str | None = None
) -> Any:
    """`words` and `good`: overrides, with blanks between them."""
    return pytest.param(Bad(words.split(), message, good.split(), real, without), id=words)


def is_named(case: Bad, prepare: Prepare) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(case.words, case.real)
    assert [part for part in case.message if part not in str(caught.value)] == [], caught.value
    assert case.without is None or case.without not in str(caught.value), caught.value


def beside(cases: Sequence[Any]) -> list[Any]:
    """What is fine beside the bad input, as much of it in one config as does not collide."""
    batches: list[tuple[list[str], set[str], bool]] = []
    for words, real in dict.fromkeys((tuple(p.values[0].good), p.values[0].real) for p in cases):
        keys = {word.lstrip("+~").split("=")[0] for word in words}
        parts = {key.split(".")[0] for key in keys}
        keys |= parts & {"model", "optimizer", "schedule"}
        if parts & {"debug", "experiments"}:
            keys.add("everything")
        for others, taken, also_real in batches:
            if not keys & taken and "everything" not in keys | taken and real == also_real:
                others.extend(words)
                taken |= keys
                break
        else:
            batches.append(([*words], keys, real))
    return [pytest.param(words, real, id=" ".join(words)) for words, _, real in batches]
