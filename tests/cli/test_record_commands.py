"""What export, note and tag take for words, and what they print."""

from pathlib import Path

import pytest

from mnist_exp.cli.main import main
from mnist_exp.config import paths
from tests.catalog.recorded import Recorded


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override that names a store with one run."""
    recorded = Recorded.new(tmp_path)
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    recorded.run("a", {})
    recorded.deliver()
    return f"tracking.uri={recorded.uri}"


@pytest.fixture
def type_in(store: str, capsys: pytest.CaptureFixture[str]) -> "Type":
    return Type(store, capsys)


class Type:
    """Calling it types a command on the store: its exit status, and what it prints."""

    def __init__(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self.capsys = store, capsys

    def __call__(self, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*words, self.store])
        out, err = self.capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out + err


def test_a_note(type_in: Type) -> None:
    assert type_in("note", "last") == (0, "\n")
    status, text = type_in("note", "last", "the first = the best")
    assert status == 0 and text.startswith("run ") and text.endswith("  a\n")
    assert type_in("note", "last") == (0, "the first = the best\n")
    status, text = type_in("note", "last", "not", "quoted")
    assert status == 2 and "note last 'not quoted'" in text
    assert type_in("note", "last", "")[0] == 0
    assert type_in("note", "last") == (0, "\n")


def test_tags(type_in: Type) -> None:
    assert type_in("tag", "last") == (0, "")
    status, text = type_in("tag", "last", "team=vision", "rule=a=b")
    assert status == 0 and text.endswith("rule=a=b\nteam=vision\n")
    assert type_in("tag", "last") == (0, "rule=a=b\nteam=vision\n")
    assert "vision" in type_in("runs", "team=vision", "--json")[1]
    for words, message in (
        (("last", "team"), "'team': a tag is key=value"),
        (("last", "=x"), "'=x': a tag is key=value"),
        (("last", "threads=2"), "cannot be given"),
        (("nope", "a=b"), "nope: there is no such run or sweep"),
    ):
        status, text = type_in("tag", *words)
        assert status == 2 and message in text


def test_export(type_in: Type, tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    status, text = type_in("export", "last", "--to", str(file))
    assert status == 0 and text.splitlines() == [
        f"metrics  {file}  11 points",
        f"runs     {tmp_path}/t.runs.csv  1 run",
    ]
    assert file.read_text().startswith("run,key,step,time,value\n")
    status, text = type_in("export", "last", "--to", str(file))
    assert status == 2 and "--force" in text
    assert type_in("export", "last", "--to", str(file), "--force")[0] == 0
    status, text = type_in("export", "last")
    assert status == 2 and "--to FILE is missing" in text


@pytest.mark.parametrize("command", ["export", "note", "tag"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: mnist-exp {command} last" in capsys.readouterr().out
