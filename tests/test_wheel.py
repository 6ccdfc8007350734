"""The package as others get it: a wheel in an environment of its own, used outside a checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import mnist_exp
from tests.helpers import ROOT, fresh_store

Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment in which the wheel is installed.

    Its dependencies are those of the present environment, as downloading torch takes minutes; a
    checkout that is installed there in place is not among them.
    """
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    programs = folder / "venv" / "bin"
    # pip's own environment is the present one, and has all that it needs
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install"]
    offline = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, *offline, str(wheel)], check=True, capture_output=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # a folder that such a file names is searched, and the files of this kind in it are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return programs


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    unwanted = ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}

    def run(program: str, *words: str) -> str:
        command = [str(installed / program), *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    return run


def test_a_wheel_is_all_that_is_needed(run: Run, installed: Path, tmp_path: Path) -> None:
    imported = run("python", "-c", "import mnist_exp; print(mnist_exp.__file__)")
    assert Path(imported.strip()).is_relative_to(installed.parent)
    assert run("mnist-exp", "--version") == f"mnist-exp {mnist_exp.__version__}\n"
    assert "lr: 0.1" in run("mnist-exp", "train", "experiments=seed_mlp", "--cfg", "job")
    assert [*tmp_path.iterdir()] == []

    assert f"picture  {tmp_path}/outputs/mnist.png" in run("mnist-exp", "show")
    fresh_store(tmp_path)
    (tmp_path / "store.db").rename(tmp_path / "mlflow.db")  # MLflow would take seconds to make it
    run("mnist-exp", "train", "debug=fast")
    (journal,) = (tmp_path / "outputs").rglob("journal.jsonl")
    assert f'"sqlite:///{tmp_path}/mlflow.db"' in journal.read_text()
