"""Faults for real runs, records and files: what the tests and `make torture` inject, and check.

    server         a real MLflow server, and before it one that refuses, hangs, answers 503 or
                   loses its answer, on command
    interruptions  runs and sweeps in forked processes, that a signal, an exception or a kill in an
                   operation on files ends at a moment drawn by chance; how a resumed one differs
    disk           runs and sweeps on a disk that is full from some write on
    delivery       records on their way to such a server, and what MLflow then lacks or has twice
    checkpoints    damaged checkpoints, and disks that fail or lose their power while one is saved
    journals       damaged journals

What goes wrong is returned as texts that begin with "lost", "doubled" or "differing", or raised as
an AssertionError. The library needs no test runner: the benchmarks import it as the tests do.
"""
