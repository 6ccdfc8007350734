"""Filters and orders of records."""

import re

import pytest

from mnist_exp.catalog import fields
from mnist_exp.catalog.filters import parse
from mnist_exp.catalog.records import Record
from mnist_exp.errors import ConfigError
from tests.catalog.recorded import Recorded


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    recorded = Recorded.new(tmp_path_factory.mktemp("filters"))
    recorded.run("a", {"optimizer.lr": 0.1, "model.hidden": [64, 32]}, tags={"model": "mlp"})
    recorded.run("b", {"optimizer.lr": 1e-2, "patience": "None"}, (0.7,), tags={"model": "cnn"})
    recorded.run("c", {"patience": 3}, end="FAILED", reason="diverged (nan)", tags={"who is": "I"})
    return recorded.load()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("optimizer.lr>0.05", "a"),
        ("lr>0.05", "a"),
        ("optimizer.lr=.01", "b"),
        ("optimizer.lr != 0.1", "bc"),  # c has none, which is not 0.1
        ("optimizer.lr<=1e-1 and model=CNN", "b"),
        ("model=cnn or status=failed", "bc"),
        ("not model=cnn", "ac"),
        ("not (model=cnn or status=failed)", "a"),
        ("status=failed and model=cnn or name=a", "a"),
        ("reason~diverged", "c"),
        ("reason~None", ""),
        ("name~null or model~ML", "a"),
        ("reason ~ 'diverged (nan)'", "c"),
        ("`who is`=i", "c"),
        ("val/accuracy>=0.7", "abc"),
        ("best/val_accuracy>0.8", "a"),
        ("patience=null", "ab"),
        ("patience!=null", "c"),
        ("epochs=1", "b"),
        ("model.hidden='[64, 32]'", "a"),
        ("kind=run", "abc"),
        ("started>2020", "abc"),
        ("started>2020-02 and ended>=2020-02-29T10:00", "abc"),
        ("val/accuracy>=85%", "ac"),
        ("best_val_accuracy<0.8", "b"),
        ("params.optimizer.lr=0.1 and tags.model=mlp", "a"),
        ("in_mlflow=false and epochs_asked=2", "abc"),
    ],
)
def test_filter(known: list[Record], text: str, expected: str) -> None:
    matches = parse(text, known)
    assert sorted(record.name for record in known if matches(record)) == list(expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "from character 1 on, the end of it"),
        ("lr>0.05 and", "from character 12 on, the end of it"),
        ("lr>0.05 modle=x", "from character 9 on, 'modle=x'"),
        ("(lr>0.05", "from character 9 on, the end of it"),
        ("lr 0.05", "cannot be read as a filter"),
        ("optmizer.lr>1", "no run has such a field. Did you mean optimizer.lr"),
        ("val/accuracy>high", "val/accuracy is a number, and 'high' is none, as in val/accuracy>"),
        ("seconds>1h", "seconds is a number, and '1h' is none"),
        ("status=finsihed", "there is no such status. Did you mean FINISHED? Allowed: RUNNING"),
        ("kind=sweeps", "Did you mean sweep?"),
        ("started>yesterday", "must be a time or the beginning of one, as in 2026-11"),
        ("started>2026-13-01", "must be a time"),
        ("accuracy>1", "several fields end so: test/accuracy, val/accuracy"),
    ],
)
def test_what_is_wrong_is_said(known: list[Record], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(text, known)


def test_order(known: list[Record]) -> None:
    names = fields.names(known)

    def ordered(order: str) -> str:
        return "".join(record.name for record in fields.sort(known, order, names))

    assert ordered("name") == "abc" and ordered("-name") == "cba"
    assert ordered("lr") == "bac" and ordered("-lr") == "abc"  # c has none: last, either way
    assert ordered("-best/val_accuracy")[0] == "a"
    with pytest.raises(ConfigError, match="no run has such a field"):
        ordered("nonsense")


def test_numbers_and_texts_in_one_field_have_an_order(known: list[Record]) -> None:
    """As where a learning rate is a text in the config of another program."""
    values = [fields.parsed(text) for text in ("0.1", "1e3", "auto", "", "None")]
    assert values == [0.1, 1000.0, "auto", None, None]
