"""What is refused before a start is what MLflow would refuse."""

import random

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from mnist_exp.tracking import limits


def mlflow_takes(key: str) -> bool:
    try:
        validation._validate_param(key, "a value")
        validation._validate_tag(key, "a value")
    except MlflowException:
        return False
    return True


ODD = ["", ".", "..", "a/", "/a", "../a", "a/../b", "a//b", "./a", "..a", "a#b", "a\tb", "ä", "a:b"]


@pytest.mark.parametrize("key", [*ODD, "a b", "a" * 250, "a" * 251])
def test_odd_names(key: str) -> None:
    assert (limits.key_problem(key) == "") == mlflow_takes(key)


def test_random_names() -> None:
    draw = random.Random(0)
    keys = ["".join(draw.choices("ab./_- :#,äé\\", k=draw.randint(1, 6))) for _ in range(2000)]
    answers = [limits.key_problem(key) == "" for key in keys]
    assert answers == [mlflow_takes(key) for key in keys]
    assert 200 < sum(answers) < 1800


def test_the_limits_are_those_of_mlflow() -> None:
    assert limits.KEY_LENGTH == validation.MAX_ENTITY_KEY_LENGTH
    assert limits.TAG_LENGTH == validation.MAX_TAG_VAL_LENGTH
    assert limits.PARAM_LENGTH == validation.MAX_PARAM_VAL_LENGTH
    assert limits.EXPERIMENT_LENGTH <= validation.MAX_EXPERIMENT_NAME_LENGTH


def test_long_and_odd_values() -> None:
    assert limits.length_problem("a" * 9, 8) and not limits.length_problem("a" * 8, 8)
    assert limits.shortened("a" * 61) == "a" * 57 + "..." and limits.shortened("a" * 60) == "a" * 60
    assert limits.storable("a\udcffb", 100) == "a\\udcffb" and limits.storable(12345, 3) == "123"
