"""What this process takes of the machine: memory and CPU time."""

import resource
import sys
import time

_BYTES = 1 if sys.platform == "darwin" else 1024  # of a unit of ru_maxrss, see getrusage(2)
MEGABYTE = 2**20


def peak_memory_mb() -> float:
    """Return the most memory that this process has had at a time, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES / MEGABYTE


def cpu_seconds() -> float:
    """Return the CPU time of this process since its start, of all its threads together."""
    return time.process_time()
