"""Made-up records for the tests of what is done with many runs."""

from tests.catalog.recorded import recorded as recorded
