"""Tests, two files of them at a time: each process, and those that it starts, has one thread.

With two threads each, they would wait for those of the other.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which comes later
