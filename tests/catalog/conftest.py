"""Made-up records for the tests of what is done with many runs."""

from pathlib import Path

import pytest

from tests.catalog.made_up import open_runs as open_runs
from tests.catalog.recorded import recorded as recorded
from tests.helpers import fresh_store


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fresh_store(tmp_path)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"
