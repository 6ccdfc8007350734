"""Whether torch works in a process that is forked from this one.

The first backward pass of a process starts a thread for each GPU. After that, torch refuses to do a
backward pass in a fork of the process. Without a GPU this happens as well, where torch.compile or
torch.export was called before the first backward pass: they make torch believe that there is one.
"""

import contextlib
import sys

import torch

from mnist_exp.system.processes import fork, receive


def can_fork() -> bool:
    """Return whether a fork is safe: on Linux, where torch has started no thread for a GPU.

    To ask for a GPU is to start one: it is not asked before the model is there to be saved.
    """
    return sys.platform == "linux" and not torch.cuda.is_available()


def can_train_in_fork() -> bool:
    """Return whether a process that is forked from this one can train: one tries, for 20 ms."""
    return receive(*fork(_try_backward)) is True


def _try_backward() -> bool:
    torch.set_num_threads(1)  # the threads of OpenMP are missing in a forked process
    with contextlib.suppress(RuntimeError):
        start_autograd()
        return True
    return False


def start_autograd() -> None:
    """Do a backward pass, so that forks can train after a model is exported or compiled."""
    torch.zeros(1, requires_grad=True).backward()
