"""A store is opened, or refused, and never half made."""

from pathlib import Path
from typing import Any

import mlflow
import pytest

from mnist_exp.tracking.store import Store
from mnist_exp.tracking.store_check import check_store
from tests.helpers import fresh_store


def test_a_database_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_store(tmp_path / "other")  # MLflow warns of itself at first use
    uri = f"sqlite:///{tmp_path}/new.db"

    def killed(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mlflow.MlflowClient, "search_experiments", killed)
        Store(uri)
    assert not (tmp_path / "new.db").exists()
    check_store(uri)
    (tmp_path / "new.db.a.part").write_bytes(b"half of it")
    (tmp_path / "new.db.a.part-journal").write_bytes(b"half of it")
    assert Store(uri).client.search_experiments()
    assert {p.name for p in tmp_path.iterdir()} == {"new.db", "new.db.lock", "other"}
