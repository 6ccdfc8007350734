"""The tags that say where a run comes from: code, versions, machine, and what was typed."""

import getpass
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mnist_exp._version import __version__
from mnist_exp.config import paths
from mnist_exp.config.paths import IS_CHECKOUT
from mnist_exp.config.schema import identity
from mnist_exp.runs.job import Job

DESCRIPTION_WIDTH = 80  # characters that MLflow's page of a run has room for


def ask_git(*arguments: str) -> str:
    """Return what git prints about the project's checkout, or "" where there is none."""
    if not IS_CHECKOUT:
        return ""
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=paths.project_root(), capture_output=True, check=False
        )
    except OSError:  # git is not installed
        return ""
    # a diff may hold bytes of any encoding
    return answer.stdout.decode(errors="replace").strip() if answer.returncode == 0 else ""


def process_tags() -> dict[str, str]:
    """Return the tags that are the same for every run of a process: user, versions, commit."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": "mnist-exp",
        "mlflow.source.type": "LOCAL",
        "command_line": shlex.join(sys.argv),
        "version.python": platform.python_version(),
        "version.torch": torch.__version__,
        "version.numpy": np.__version__,  # whose generators decide the order of the data
        "version.mnist_exp": __version__,
    }
    if commit := ask_git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git_dirty"] = str(bool(ask_git("status", "--porcelain"))).lower()
    return tags


def stack_tags(job: Job, size: int) -> dict[str, str]:
    """Return the tags that the runs of a stack of `size` have in common; `job` is one of them."""
    tags = {
        **process_tags(),
        "device": str(job.device),
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "compiled": "false",
        "stack_size": str(size),
        # a model that was not chosen from its group goes by its class
        "model": job.choices.get("model") or job.config.model["_target_"].rpartition(".")[2],
    }
    if job.device.type == "cuda":
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        tags["gpu"] = f"{torch.cuda.get_device_name(job.device)}, {versions}"
    return tags


def run_tags(job: Job, folder: Path, common: Mapping[str, str]) -> dict[str, str]:
    """Return all tags that a run begins with. `common`: its sweep's, and its stack's."""
    return {
        **common,
        **described("To train it again:", *job.overrides),
        "overrides": shlex.join(job.overrides),
        "config_hash": identity(job.task_config),
        "dataset": job.config.dataset.name,
        "optimizer": job.choices.get("optimizer") or job.optimizer.__name__,
        "choices": json.dumps(job.choices),
        "output_dir": str(folder.resolve()),
        **job.config.tracking.tags,
    }


def described(text: str, *arguments: str) -> dict[str, str]:
    """Return the tag that MLflow's UI shows as a run's description.

    It is a text in Markdown with a `mnist-exp train` command of these arguments under it.
    """
    lines = ["mnist-exp train"]
    for word in map(shlex.quote, arguments):  # a long line would push aside what is beside it
        if len(lines[-1]) + len(word) < DESCRIPTION_WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    command = " \\\n".join(lines)
    return {"mlflow.note.content": f"{text}\n\n```\n{command}\n```"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())
