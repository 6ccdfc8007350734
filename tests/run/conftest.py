"""What the tests of runs share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import fresh_store


@pytest.fixture
def place(tmp_path: Path) -> Iterator[list[str]]:
    """Overrides for a store and an output folder that are a test's own."""
    yield ["debug=fast", f"tracking.uri={fresh_store(tmp_path)}", f"hydra.run.dir={tmp_path}/run"]
