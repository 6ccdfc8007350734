"""Made-up records for the tests of what is done with many runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mnist_exp.config import paths
from mnist_exp.tracking.run_log import OpenRuns, open_runs_at
from tests.catalog import made_up
from tests.catalog.recorded import recorded as recorded


@pytest.fixture
def open_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenRuns]:
    """The registry of a project whose outputs go to the test's own folder."""
    monkeypatch.setattr(paths, "output_root", lambda: tmp_path)
    yield open_runs_at(tmp_path)
    for writer in made_up.begun:
        writer.journal.close()
    made_up.begun.clear()
