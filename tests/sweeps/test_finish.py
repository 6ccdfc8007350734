"""The end of a sweep, which writes to its parent run what others may have written to as well."""

from pathlib import Path
from typing import Any

import mlflow
import pytest

import mnist_exp
from mnist_exp.config import paths
from mnist_exp.sweeps import finish
from mnist_exp.tracking.notes import DESCRIPTION, NOTE
from tests.helpers import fresh_store


def test_a_note_that_was_given_meanwhile_stays_before_the_leaderboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    store = f"tracking.uri={fresh_store(tmp_path)}"
    test_cell = finish._test_cell

    def noted(*arguments: Any) -> list[str]:
        mnist_exp.note(str(tmp_path / "jobs"), "while it ran", [store])
        return test_cell(*arguments)

    monkeypatch.setattr(finish, "_test_cell", noted)
    words = ["debug=fast", "hydra/launcher=basic", "training.compile=never", "seed=0,1"]
    result = mnist_exp.train_sweep([*words, store, f"hydra.sweep.dir={tmp_path}/jobs"])
    tags = mlflow.MlflowClient(result.store).get_run(result.run_id).data.tags
    assert tags[NOTE] == "while it ran" and tags["chosen"] == "all seeds"
    assert tags[DESCRIPTION].startswith("while it ran\n\n| rank |")
    assert "To train the best again:" in tags[DESCRIPTION]

    mnist_exp.note(result.run_id, "", [store])
    tags = mlflow.MlflowClient(result.store).get_run(result.run_id).data.tags
    assert tags[NOTE] == "" and tags[DESCRIPTION].startswith("| rank |")
