"""What compare takes for words, and what it prints."""

import json
from pathlib import Path

import pytest

from mnist_exp.cli.main import main
from mnist_exp.config import paths
from tests.catalog.recorded import Recorded
from tests.cli.test_record_commands import Type

GRID = [{"optimizer.lr": lr, "seed": seed} for lr in (0.1, 0.3) for seed in (0, 1)]


@pytest.fixture
def type_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Type:
    """Types commands on a store with a run and a sweep, which is the newest."""
    recorded = Recorded.new(tmp_path)
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    recorded.run("a", {"seed": 5})
    recorded.sweep("grid", GRID)
    recorded.deliver()
    return Type(f"tracking.uri={recorded.uri}", capsys)


def test_cells_in_the_terminal_and_as_a_figure(type_in: Type, tmp_path: Path) -> None:
    status, text = type_in("compare", "last:lr=0.3", "last:2", "--figure", f"{tmp_path}/new.svg")
    assert status == 0 and "optimizer.lr   0.3 " in text and "82.500 % ± 0.707 (2)" in text
    assert f"figure {tmp_path}/new.svg\n" in text
    assert b"<svg" in (tmp_path / "new.svg").read_bytes()


def test_runs_say_how_their_predictions_are_kept(type_in: Type) -> None:
    status, text = type_in("runs", "--all", "--json")
    ids = {run["name"]: run["id"] for run in json.loads(text)}
    status, text = type_in("compare", ids["a"], ids["1"])
    assert status == 0
    for name in ("a", "1"):
        assert f"evaluate {ids[name][:8]} {type_in.store}" in text
    status, text = type_in("compare", ids["a"], ids["1"], "--json")
    assert status == 0
    assert json.loads(text)["predictions"][0]["evaluate"] == [ids["a"], ids["1"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["last"], "last alone is named"),
        (["last", "last:1"], "it is the same as last"),
        (["last:1", "last:lr=9"], "no cell has these values"),
        (["last:1", "last:2", "--figure", "new.gif"], "must end in .png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], message: str, type_in: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.rglob("*")}
    status, text = type_in("compare", *words)
    assert status == 2 and message in text
    assert {*tmp_path.rglob("*")} == before


def test_its_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "example: mnist-exp compare last:1 last:2" in out
