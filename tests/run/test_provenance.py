"""The tags that say where a run comes from; those of a whole run are in test_recorder."""

from pathlib import Path

import pytest

import mnist_exp
from mnist_exp.errors import ConfigError
from mnist_exp.run.provenance import ask_git


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_git("rev-parse", "HEAD") == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+tracking.tags={threads: many}",
            r"tracking\.tags\.threads=many: .*the program's own",
        ),
        ("+tracking.tags={mlflow.runName: mine}", r"tags\.mlflow\.runName=mine: .*another name"),
        ("+tracking.tags={run_key: a}", "the program's own"),
        ("+tracking.tags={a/../b: a}", "lead elsewhere"),
        ("+tracking.tags={a@b: a}", "letters, digits"),
        ("+tracking.tags={" + "k" * 300 + ": a}", "300 characters, and MLflow takes 250"),
        ("+tracking.tags={a: " + "v" * 8001 + "}", r"tags\.a=v+\.\.\.: it has 8001 characters"),
        ("tracking.run_name=" + "n" * 251, r"tracking\.run_name=n+\.\.\.: it has 251"),
        ("tracking.experiment=" + "n" * 257, r"tracking\.experiment=n+\.\.\.: it has 257"),
        ("+" + "k" * 300 + "=1", "240 bytes at most"),
        ("+tracking.tags." + "k" * 300 + "=1", "240 bytes at most"),
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.parametrize("sweep", [False, True])
def test_names_that_mlflow_would_refuse_or_that_are_taken(
    override: str, message: str, sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_exp.run.trial.try_run", lambda *_: None)
    words = ["debug=fast", f"tracking.uri=sqlite:///{tmp_path}/a.db", override]
    with pytest.raises(ConfigError, match=message):
        if sweep:
            mnist_exp.train_sweep([*words, "seed=0,1", f"hydra.sweep.dir={tmp_path}/runs"])
        else:
            mnist_exp.train([*words, f"hydra.run.dir={tmp_path}/run"])
    assert list(tmp_path.iterdir()) == []
