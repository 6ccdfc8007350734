"""Made-up records for the tests of what is done with many runs."""

from tests.catalog.made_up import open_runs as open_runs
from tests.catalog.recorded import recorded as recorded
