"""What the tests of augmentation share."""

import pytest


@pytest.fixture(autouse=True)
def single_threaded(one_thread: None) -> None:
    """For every test here."""
