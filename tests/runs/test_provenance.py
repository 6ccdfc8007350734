"""The tags that say where a run comes from; those of a whole run are in test_recorder."""

from pathlib import Path

import pytest

from mnist_exp.runs.provenance import ask_git


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_git("rev-parse", "HEAD") == ""
