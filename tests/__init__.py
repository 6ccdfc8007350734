"""Two test files run at a time (pytest-xdist), and every process here has one thread.

With two threads each, the processes would compete for two cores.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which comes later
