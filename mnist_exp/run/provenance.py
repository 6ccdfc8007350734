"""The tags that say where a run comes from: code, versions, machine, and what was typed."""

import getpass
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from mnist_exp._version import __version__
from mnist_exp.config import paths
from mnist_exp.config.paths import IS_CHECKOUT
from mnist_exp.config.schema import identity, leaves
from mnist_exp.errors import ConfigError
from mnist_exp.run.job import Job
from mnist_exp.tracking.limits import (
    EXPERIMENT_LENGTH,
    RUN_NAME_LENGTH,
    check_tag,
    key_problem,
    length_problem,
    shortened,
)
from mnist_exp.tracking.notes import DESCRIPTION

DESCRIPTION_WIDTH = 80  # characters that MLflow's page of a run has room for
SWEPT = "sweep."  # how the parameters of a sweep's parent run begin


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
        **job.config.tracking.tags,
        **common,
        **described("To train it again:", *job.overrides),
        "overrides": shlex.join(job.overrides),
        "config_hash": identity(job.task_config),
        "dataset": job.config.dataset.name,
        "optimizer": job.choices.get("optimizer") or job.optimizer.__name__,
        "choices": json.dumps(job.choices),
        "output_dir": str(folder.resolve()),
    }


def check_names(job: Job) -> None:
    """Raise ConfigError for a name or a tag of a run that MLflow would refuse, or that is taken."""
    tracking = job.config.tracking
    for key, value in tracking.tags.items():
        check_tag(f"tracking.tags.{shortened(key)}", key, value)
    for key, text, limit in (
        ("run_name", tracking.run_name or "", RUN_NAME_LENGTH),
        ("experiment", tracking.experiment, EXPERIMENT_LENGTH),
    ):
        if problem := length_problem(text, limit):
            raise ConfigError(f"tracking.{key}={shortened(text)}: {problem}")
    for key, _ in leaves(asdict(job.config)):
        # a sweep's parent run has what was swept as parameters of its own
        if problem := key_problem(f"{SWEPT}{key}"):
            raise ConfigError(f"{shortened(key)}: {problem}")


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
    return {DESCRIPTION: f"{text}\n\n```\n{command}\n```"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())
